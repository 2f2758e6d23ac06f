"""A picture of the top of a report.html, as the README shows it.

    python RedditTLDR/prepare.py --demo && python RedditTLDR/train_basis.py
    cd RedditTLDR
    python ../tests/benchmarks/picture_of_report.py results/report.html demo/report.png

It needs Chromium (on Debian: apt-get install chromium). The picture has few colours and is as wide
as the README, so that it stays small.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WINDOW = (1280, 2290)  # pixels: the page down to the picture of the directions
WIDTH = 760  # of the picture
COLORS = 256
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def photograph(browser: str, page: Path, picture: Path) -> None:
    """Write the top of the page as a PNG file."""
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--window-size={WINDOW[0]},{WINDOW[1]}", f"--screenshot={picture}"),
        page.resolve().as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="a report.html")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("error: no Chromium is installed")
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "full.png"
        photograph(browser, arguments.page, full)
        image = Image.open(full).convert("RGB")
        height = round(image.height * WIDTH / image.width)
        small = image.resize((WIDTH, height), Image.Resampling.LANCZOS)
        # An octree keeps colours of small areas, such as the edge of the verdict.
        flat = small.quantize(COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        flat.save(arguments.picture, optimize=True)
    print(f"{arguments.picture}: {arguments.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
