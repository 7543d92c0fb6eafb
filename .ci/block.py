"""Print the bash block below a heading of a Markdown page; fail where there is none.

Usage: python3 .ci/block.py PAGE HEADING
"""

import re
import sys
from pathlib import Path

page, heading = sys.argv[1:]
section = re.search(
    rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", Path(page).read_text("utf-8"), re.M | re.S
)
block = section and re.search(r"^```bash\n(.*?)^```$", section[1], re.M | re.S)
if not block or not block[1].strip():
    sys.exit(f"{page}: no bash block below the heading '## {heading}'")
print(block[1], end="")
