"""Takes the picture of a report for the README: python docs/screenshot.py RUN_FOLDER."""

import shutil
import sys
from pathlib import Path

from selenium import webdriver

PICTURE = Path(__file__).with_name("report.png")


def main() -> None:
    """Open report.html in Chromium, as wide as a page of the README, and keep its first screen."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.set_window_size(1000, 775)
        browser.get((Path(sys.argv[1]) / "report.html").resolve().as_uri())
        browser.save_screenshot(PICTURE)
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
