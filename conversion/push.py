"""Uploads a certified Hugging Face folder to the Hub, after verifying it; its model card becomes README.md.

    python conversion/push.py DIR ORGANIZATION/NAME [--public]

DIR is what conversion/merge_lora.py, quantize_fp8.py or nemo_to_hf.py wrote (they take --push NAME too). A new
repository is private unless --public is given; one that is public already is refused without it. Everything is one
commit, which also removes weights and settings that an earlier upload left there. The token is huggingface_hub's:
`hf auth login`, or HF_TOKEN; HF_ENDPOINT names another Hub.
"""

from __future__ import annotations

try:
    from nano3.cli import UserError, run
except ModuleNotFoundError as missing:
    import sys

    print(f"error: {missing}; run: make install, then: . .venv/bin/activate", file=sys.stderr)
    raise SystemExit(2) from None

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversion.certificates.certificate_json import read_certificate
from conversion.certificates.model_card import model_card, read_readme
from conversion.certify import verify
from conversion.checkpoint.model_folder import WEIGHT_ENDS, side_files
from conversion.checkpoint.output_folder import CARD, CERTIFICATE
from conversion.checkpoint.safetensors_layout import INDEX, FileLayout
from nano3.arch import is_nemo_checkpoint
from nano3.documents import MAX_BYTES
from nano3.network import check_address, within, without

README = "README.md"
ANSWER_SECONDS = 300.0
"""Longest wait for an answer of the Hub, all of it; an upload may take as long again as its bytes at `SLOWEST`."""
SLOWEST = 250_000.0
"""Bytes a second below which an upload is given up."""
PLAIN = "identity"
"""HTTP's word for an answer that is not compressed (RFC 9110, section 8.4)."""
_OURS = (INDEX, "hf_quant_config.json", "adapter_config.json", "chat_template.jinja", "generation_config.json")
"""What an earlier upload may have left that makes readers take this model for another."""


class Hub:
    """A model repository to write to. Made before hours of work, it refuses at once what would fail in the end.

    Raises `UserError` without a token, for a name that is none, for a repository that is public and was not meant to
    be, and with the Hub's words for what it refuses.
    """

    def __init__(self, repository: str, public: bool = False) -> None:
        from huggingface_hub import HfApi, constants, get_token

        if not get_token():
            raise UserError("no token for the Hugging Face Hub: `hf auth login`, or set HF_TOKEN, then again")
        check_address(constants.ENDPOINT)
        _bound_answers()
        self.repository, self.public, self._api = repository, public, HfApi()
        self._ask("validate", _check_name, repository)
        self.exists = self._ask("look for", self._api.repo_exists, repository)
        if self.exists and not public and not self._ask("read", self._api.repo_info, repository).private:
            raise UserError(f"{repository} is public; choose another name, or say --public")

    def upload(self, folder: Path) -> str:
        """Verifies the folder, uploads it and returns the commit's address. Raises `UserError`, and nothing changed."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = files_to_push(folder)
        problems = verify(folder)
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"not uploaded, it is not what its certificate says: {'; '.join(problems[:3])}{more}")
        if not self.exists:
            self._ask("create", self._api.create_repo, self.repository, private=not self.public)
        there = self._ask("list", self._api.list_repo_files, self.repository) if self.exists else []
        stale = [name for name in there if (name.endswith(WEIGHT_ENDS) or name in _OURS) and name not in files]
        card = model_card(read_certificate(folder), read_readme(folder)).encode()  # whatever lies there as its card
        operations = [
            *(CommitOperationAdd(name, card if name == README else path) for name, path in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        message = f"{read_certificate(folder)['kind']}, certified"
        seconds = ANSWER_SECONDS + sum(path.stat().st_size for path in files.values()) / SLOWEST
        commit = self._ask(
            "write", self._api.create_commit, self.repository, operations, commit_message=message, seconds=seconds
        )
        return commit.commit_url

    def _ask(self, what: str, call: Any, *arguments: Any, seconds: float = ANSWER_SECONDS, **more: Any) -> Any:
        import httpx
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return within(seconds, lambda: call(*arguments, **more))
        except TimeoutError:
            raise UserError(f"cannot {what} {self.repository}: no answer of the Hub in {seconds:.0f} s") from None
        except (HfHubHTTPError, ValueError, httpx.TransportError) as error:  # a wrong name or card is a ValueError
            reason = without(get_token(), " ".join(str(error).split()))
            raise UserError(f"cannot {what} {self.repository} on the Hub: {reason}") from None


def _bound_answers() -> None:
    """Makes huggingface_hub's client refuse an answer longer than `MAX_BYTES`, each one by itself.

    Answers are asked for as they are: a small compressed one may stand for any amount of memory.
    """
    import httpx
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import get_session

    class Bounded(httpx.SyncByteStream):
        """The bytes of an answer, as many as are allowed."""

        def __init__(self, response: httpx.Response) -> None:
            self.stream, self.url = response.stream, response.url

        def __iter__(self) -> Iterator[bytes]:
            assert isinstance(self.stream, httpx.SyncByteStream)
            left = MAX_BYTES
            for part in self.stream:
                left -= len(part)
                if left < 0:
                    raise UserError(f"{self.url} answers with more than {MAX_BYTES >> 20} MiB; is HF_ENDPOINT right?")
                yield part

        def close(self) -> None:
            assert isinstance(self.stream, httpx.SyncByteStream)
            self.stream.close()

    def bound(response: httpx.Response) -> None:
        form = response.headers.get("Content-Encoding", PLAIN)
        if form != PLAIN:
            raise UserError(f"{response.url} answers in the form {form[:40]!r}, not asked for; is HF_ENDPOINT right?")
        response.stream = Bounded(response)

    hooks = {"request": get_session().event_hooks["request"], "response": [bound]}
    headers = {"Accept-Encoding": PLAIN}
    set_client_factory(lambda: httpx.Client(event_hooks=hooks, headers=headers, follow_redirects=True, timeout=None))


def files_to_push(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file. The card is README.md there; the base's README.md speaks of another model."""
    if is_nemo_checkpoint(folder):
        raise UserError(f"{folder} is a NeMo checkpoint; export it with conversion/nemo_to_hf.py and push that")
    read_certificate(folder)  # or no card either
    layout = FileLayout.read(folder, quantized=True)
    names = [str(path) for path in side_files(folder)] + [*layout.headers, CERTIFICATE]
    names += [INDEX] if layout.index is not None else []
    return {name: folder / name for name in sorted(names) if name != README} | {README: folder / CARD}


def _check_name(repository: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repository)
    if "/" not in repository:
        raise ValueError("give ORGANIZATION/NAME")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder with certificate.json")
    parser.add_argument("repository", metavar="ORGANIZATION/NAME", help="model repository")
    parser.add_argument("--public", action="store_true", help="let everybody see it")
    args = parser.parse_args()
    files_to_push(args.folder)
    print(Hub(args.repository, args.public).upload(args.folder))
    return 0


if __name__ == "__main__":
    run(main)
