"""The version of the project that is running."""

import subprocess
from pathlib import Path


def get_sha() -> str:
    """Return the git commit and branch of the project, and whether its files were changed."""

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)

    try:
        sha, branch = git("rev-parse", "HEAD").strip(), git("rev-parse", "--abbrev-ref", "HEAD").strip()
        status = "has uncommitted changes" if git("diff", "HEAD", "--name-only").strip() else "clean"
    except (OSError, subprocess.CalledProcessError):
        return "sha: unknown, status: not a git checkout"
    return f"sha: {sha}, status: {status}, branch: {branch}"
