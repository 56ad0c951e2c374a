"""Copy one released file from the user's package index to standard output, byte for byte.

A script for a process of its own, because it uses pip's finder and session, which pip does not promise to
keep. It goes this way so that the index, mirror, proxy, certificate and credential settings of the user's pip
apply, and because ``pip download`` would run the ``setup.py`` of a source archive. Nothing here is unpacked,
built or imported.

Usage: _pip_stream.py PROJECT FILENAME SHA256
Exit status: see the constants. The reason for a failure goes to standard error.
"""

import os
import sys
from typing import IO, Any

NO_PIP, NOT_FOUND, NETWORK = 3, 4, 5


def stream(project: str, filename: str, sha256: str, output: IO[bytes]) -> int:
    try:
        from pip._internal.commands import create_command

        command: Any = create_command("download")  # its class is not public
        wheel = filename.endswith(".whl")
        # The file is named, so a preference for wheels or sources in the user's settings must not hide it.
        kind = ["--only-binary" if wheel else "--no-binary", project]
        with command.main_context():
            options, _ = command.parse_args(["--no-deps", "--no-input", "--disable-pip-version-check", *kind])
            session = command.get_default_session(options)
            finder = command._build_package_finder(options, session)
            links = [candidate.link for candidate in finder.find_all_candidates(project)]
            links = [link for link in links if link.filename.lower() == filename.lower()]
            if not links:
                print(f"no file {filename} of {project} on the package index in use", file=sys.stderr)
                return NOT_FOUND
            # The same name can be on several indexes: prefer the one that announces the expected digest.
            link = max(links, key=lambda link: link.hash == sha256)
            url = link.url_without_fragment
    except (ImportError, AttributeError, TypeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return NO_PIP
    try:
        response = session.get(url, stream=True, headers={"Accept-Encoding": "identity"})
        response.raise_for_status()
        while chunk := response.raw.read(1 << 16):
            output.write(chunk)
        output.flush()
    except BrokenPipeError:
        return NETWORK  # the reader gave up and knows why
    except Exception as error:  # requests and urllib3 as vendored by pip; their classes move between releases
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return NETWORK
    return 0


if __name__ == "__main__":
    # The first entry is the folder of this file: its modules must not shadow what pip imports.
    del sys.path[0]
    # Anything that pip prints must not end up in the file.
    project, filename, sha256 = sys.argv[1:]
    with os.fdopen(os.dup(1), "wb") as payload:
        os.dup2(2, 1)
        status = stream(project, filename, sha256, payload)
    sys.exit(status)
