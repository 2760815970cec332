"""`save_pretrained`, `from_pretrained` and `push_to_hub` of a `ReViT`, and repositories of the Hugging Face Hub.

A saved model is a bundle (`revit_fast.bundle`), whose files have the names that the Hub knows: what `fit` writes and
the commands take is a repository as it stands, assigner included. Weights are read from safetensors alone.

`ReViT` has the methods of huggingface_hub's `PyTorchModelHubMixin` without being one. As a base class it would make the
package import huggingface_hub, and a subclass with it would be another model than `from_timm` returns and `optimize`
takes. Its loading passes over a missing configuration and tensors of other names, and falls back to pickles; its
saving removes the old configuration before there is a new one. What it is for, the Hub, it does here too: an upload
goes through a mixin that is made for it. Folders are written and read without huggingface_hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revit_fast.model import ReViT

SCHEME = "hf-hub:"
"""Marks a repository where a folder may be meant, as in timm: `hf-hub:user/name` or `hf-hub:user/name@revision`."""

PARTS = ("tla", "classes", "settings", "policy", "card")
"""Of a bundle, beside the model; arguments of `save_bundle`."""


class Pretrained:
    """The methods of a `ReViT` that save it, load it, and bring it to the Hub."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Writes the model as a bundle, all or nothing: `config.json`, `model.safetensors`, `README.md`, its assigner.

        Args:
            save_directory: a new or empty folder, or a bundle to be replaced; other files in it are kept.
            push_to_hub: also upload it.
            repo_id: where to; by default the folder's name.
            **options: arguments of `save_bundle`: tla (the assigner), classes, settings, policy, card; with
                `push_to_hub` also those of an upload.

        Returns:
            The address of the upload, where there was one.

        Raises:
            TypeError, ValueError: for an unknown option; see `save_bundle`.
        """
        from revit_fast.bundle import save_bundle

        parts = {name: value for name, value in options.items() if name in PARTS}
        if len(parts) < len(options) and not push_to_hub:
            unknown = ", ".join(name for name in options if name not in PARTS)
            raise TypeError(f"options: expected {', '.join(PARTS)}, got {unknown}; an upload needs push_to_hub=True")
        save_bundle(save_directory, self, **parts)
        return self.push_to_hub(repo_id or Path(save_directory).name, **options) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the model to the Hub as a bundle, in one commit.

        Args:
            repo_id: "user/name" of the repository, which is made where there is none.
            **options: arguments of `save_bundle`: tla (the assigner), classes, settings, policy, card; and of
                `huggingface_hub.ModelHubMixin.push_to_hub`: commit_message, private, token, branch, create_pr,
                allow_patterns, ignore_patterns, delete_patterns.

        Returns:
            The address of the commit.

        Raises:
            ImportError: where huggingface_hub is not installed.
            TypeError, ValueError: for an unknown option; see `save_bundle`.
        """
        from revit_fast.bundle import save_bundle

        parts = {name: options.pop(name) for name in PARTS if name in options}
        foreign = [name for name in ("config", "model_card_kwargs") if name in options]
        if foreign:
            raise TypeError(f"{foreign[0]}: a bundle has its own; expected {', '.join(PARTS)} and those of an upload")
        return _uploader(lambda folder: save_bundle(folder, self, **parts)).push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> ReViT:
        """The model of a bundle, in evaluation mode; `revit_fast.load` also brings its assigner and policy.

        Args:
            pretrained_model_name_or_path: a folder; the name of a model that the package ships; or a repository of the
                Hub, "user/name", with or without "hf-hub:" before it and "@revision" behind it.
            revision: branch, tag or commit of the repository.
            cache_dir: where downloads are kept; by default huggingface_hub's.
            token: of the Hub; by default that of the login.
            force_download: download again what is there.
            local_files_only: take what is there.
            **arguments: of the constructor, in the place of those that were saved: drop_path_rate, ...

        Raises:
            FileNotFoundError: where a file is missing.
            ImportError, OSError: see `download`.
            ValueError: where a file cannot be read, or files or arguments do not fit each other; the message names it.
        """
        from revit_fast.bundle import SHIPPED, read_model, shipped_names

        name = pretrained_model_name_or_path
        if not isinstance(name, str) or Path(name).is_dir():
            folder = Path(name)
        elif name in shipped_names():
            folder = SHIPPED / name
        else:
            options = {"cache_dir": cache_dir, "token": token, "force_download": force_download}
            folder = download(name, revision=revision, local_files_only=local_files_only, **options)
        return read_model(folder, cls, arguments)


def download(repo_id: str, *, revision: str | None = None, **options: Any) -> Path:
    """The folder that holds a repository's bundle: downloaded, or as it is kept from an earlier time.

    Args:
        repo_id: "user/name", with or without "hf-hub:" before it and "@revision" behind it.
        revision: branch, tag or commit.
        **options: of `huggingface_hub.snapshot_download`: cache_dir, token, force_download, local_files_only, ...

    Raises:
        ImportError: where huggingface_hub is not installed.
        OSError: where the Hub does not give it; the message says why.
    """
    from revit_fast.bundle import ASSIGNER, CARD, CONFIG, MODEL

    name, _, tail = repo_id.removeprefix(SCHEME).partition("@")
    hub = _huggingface_hub(f"{repo_id!r} is no folder here, and repositories of the Hub need")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = [CONFIG, MODEL, ASSIGNER, CARD]
        return Path(hub.snapshot_download(name, revision=revision or tail or None, allow_patterns=files, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{repo_id!r} is no folder here, and the Hub gave no such repository: {reason}") from error


def _uploader(write: Callable[[Path], None]):
    """huggingface_hub's mixin over what `write` puts into a folder."""

    class Uploader(_huggingface_hub("push_to_hub needs").PyTorchModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            write(save_directory)

    return Uploader()


def _huggingface_hub(who_needs: str):
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(f'{who_needs} huggingface_hub: pip install "revit-fast[hub]"') from None
    return huggingface_hub
