"""Write gdmd/evaluation/reference_curves.json, which reports draw behind a run's own curves, from finished runs.

gdmd train shapes_gdmd loop.start_from=shapes:dmd --run runs/gdmd
python tools/reference_curves.py "GDMD=runs/gdmd" "DMD=runs/dmd"
"""

import json
import sys
from pathlib import Path

from gdmd.evaluation.reference_curves import FILE, stored
from gdmd.recipes.run_folders import config_of
from gdmd.runs.run_folder import read_facts, read_metrics
from gdmd.runs.student_file import command_of


def of(name: str, run: Path) -> dict[str, object]:
    """The curves of a run folder."""
    return stored(name, command_of(read_facts(run)), read_metrics(run), config_of(run))


if __name__ == "__main__":
    runs = [of(name, Path(run)) for name, _, run in (argument.partition("=") for argument in sys.argv[1:])]
    FILE.write_text(json.dumps({"runs": runs}, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{len(runs)} runs, {FILE.stat().st_size} bytes in {FILE}")
