"""`python -m loadtest`."""

import sys

try:
    from loadtest.cli import main
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("aiohttp", "hdrh"):  # what the extra `loadtest` brings
        raise
    sys.exit(
        f"loadtest: error: {package} is not installed; `make loadtest` installs it, or in the project's folder: "
        f"{sys.executable} -m pip install -c constraints.txt -e '.[loadtest]'"
    )

sys.exit(main())
