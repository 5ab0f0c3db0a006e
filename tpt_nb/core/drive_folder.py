"""A whole folder from Google Drive, such as the databases of RA-TTA's authors: through gdown.

Drive gives no checksums to strangers, so that a file counts as good if it is no web page. What came
stays, and the next call goes on behind it.
"""

from pathlib import Path

from tpt_nb.core.download import DownloadError, explain_disk
from tpt_nb.core.files import only_writer
from tpt_nb.core.messages import first_line

ADDRESS = "https://drive.google.com/drive/folders/"


def fetch_folder(drive_id: str, folder: str | Path, progress: bool = True) -> Path:
    """The files of a folder on Google Drive, in ``folder``.

    Raises:
        DownloadError: Drive gave none of them, or a web page in place of one (its quota).
        OSError: the disk is full, or the folder cannot be written.
    """
    import gdown

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = f"Try again later, or get the files with a browser from {ADDRESS}{drive_id} and put "
    by_hand += f"them into {folder}."
    with only_writer(folder):
        try:
            came = gdown.download_folder(
                id=drive_id, output=str(folder), quiet=not progress, resume=True
            )
        except OSError as error:
            raise explain_disk(error, folder) from error
        except Exception as error:  # gdown's own exceptions change with its versions
            raise DownloadError(f"Google Drive: {first_line(error)}. {by_hand}") from error
    if not came:
        raise DownloadError(f"Google Drive gave no file of the folder. {by_hand}")
    for path in map(Path, came):
        with open(path, "rb") as file:
            head = file.read(512).lstrip().lower()
        if head.startswith((b"<!doctype html", b"<html")):
            path.unlink()
            raise DownloadError(
                f"Google Drive sent a web page in place of {path.name} (its quota, probably). "
                f"{by_hand}"
            )
    return folder
