"""The human preference study (arXiv 2604.19009, Fig. 8): plan, serve, analyze, simulate."""
