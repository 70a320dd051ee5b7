"""GDMD: few-step text-to-image students by distribution matching and gradient-based rewards (arXiv 2604.19009)."""

__version__ = "0.1.0"
