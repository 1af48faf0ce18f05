"""Fetch an archive of models, hold it against its sha256, unpack it: `fetch.py URL SHA256 FOLDER`.

Runs in an init container. Nothing is unpacked before the digest is right; only plain files and folders are, and only
below FOLDER. Ends with 1 and one line that says why.
"""

import hashlib
import pathlib
import shutil
import sys
import tarfile
import tempfile
import urllib.request

CHUNK = 1 << 20
SECONDS = 60.0  # of silence after which the download is given up


def fetch(url: str, sha256: str, folder: pathlib.Path) -> int:
    """Unpack what `url` has into `folder`; the number of files. Raises OSError, tarfile.TarError or ValueError."""
    digest = hashlib.sha256()
    # Beside where it goes: /tmp is small.
    with tempfile.TemporaryFile(dir=folder) as archive:
        with urllib.request.urlopen(url, timeout=SECONDS) as response:
            while chunk := response.read(CHUNK):
                digest.update(chunk)
                archive.write(chunk)
        if digest.hexdigest() != sha256.lower():
            raise ValueError(f"expected sha256 {sha256}, got {digest.hexdigest()}")
        archive.seek(0)
        files = 0
        with tarfile.open(fileobj=archive) as tar:
            for member in tar:
                path = pathlib.PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                    raise ValueError(f"{member.name!r}: expected a plain file or folder below the archive's top")
                target = folder / path
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                with target.open("wb") as out:
                    shutil.copyfileobj(content, out, CHUNK)
                files += 1
    return files


def main(arguments: list[str]) -> int:
    url, sha256, folder = arguments
    try:
        files = fetch(url, sha256, pathlib.Path(folder))
    except tarfile.TarError:
        print(f"fetch: {url}: expected a tar archive, plain or compressed", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"fetch: {url}: {error}", file=sys.stderr)
        return 1
    print(f"fetch: {files} files, sha256 {sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
