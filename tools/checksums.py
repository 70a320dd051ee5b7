"""Write gdmd/assets/sha256.json, which the tests and ``gdmd doctor`` check the shipped files against.

Run it after an asset has changed: python tools/checksums.py
"""

import json

from gdmd.programs.doctor import SUMS, checksums
from gdmd.runs.assets import asset_folder

if __name__ == "__main__":
    found = checksums(asset_folder())
    (asset_folder() / SUMS).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{len(found)} files in {asset_folder() / SUMS}")
