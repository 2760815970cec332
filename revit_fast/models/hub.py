"""Finds saved models: in folders, among those that the package ships, in repositories of the Hugging Face Hub.

The files of a saved model (`folder`) have the names that the Hub expects: a folder that `fit` writes and the commands
take can be uploaded unchanged, including the assigner. Weights are read from safetensors only.

`ReViT` has the methods of huggingface_hub's `PyTorchModelHubMixin` but does not inherit from it. With that base class
the package would have to import huggingface_hub, and a subclass with it would not be the class that `from_timm` returns
and `optimize` takes. The mixin's loading ignores a missing configuration and tensors of other names, and falls back to
pickles. Its saving removes the old configuration before it writes the new one. Only uploads use the mixin, with a new
instance for each upload. Folders are written and read without huggingface_hub.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from revit_fast.models.folder import ASSIGNER, CARD, CONFIG, MODEL, check_assigner, read_model, write_folder
from revit_fast.models.macs import forward_macs

SHIPPED = Path(__file__).parents[1] / "zoo"
"""The folder of the models that the package ships."""

SCHEME = "hf-hub:"
"""Prefix that marks a repository and not a folder, as in timm: `hf-hub:user/name` or `hf-hub:user/name@revision`."""

PARTS = ("tla", "classes", "settings", "policy", "card")
"""Contents of a folder besides the model, as named by the arguments of `save_bundle`."""

M = TypeVar("M", bound="Pretrained")


class Pretrained:
    """The methods of a `ReViT` that save it, load it, and upload it to the Hub."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Writes `config.json`, `model.safetensors`, `README.md` and the assigner's file, all or nothing.

        Args:
            save_directory: a new or empty folder, or a saved model to replace, see `save_bundle`.
            push_to_hub: whether to upload the folder too.
            repo_id: "user/name" of the repository; by default the folder's name.
            **options: tla (the assigner), classes, settings, policy (with an assigner) and card, see `save_bundle`;
                with `push_to_hub` also the options of an upload.

        Returns:
            The address of the upload; None without one.

        Raises:
            TypeError, ValueError: for an unknown option; see `save_bundle`.
        """
        parts = {name: value for name, value in options.items() if name in PARTS}
        if len(parts) < len(options) and not push_to_hub:
            unknown = ", ".join(name for name in options if name not in PARTS)
            raise TypeError(f"options: expected {', '.join(PARTS)}, got {unknown}; an upload needs push_to_hub=True")
        self._write(save_directory, parts)
        return self.push_to_hub(repo_id or Path(save_directory).resolve().name, **options) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the files that `save_pretrained` writes to the Hub, in one commit.

        Args:
            repo_id: "user/name" of the repository, which is created if it does not exist.
            **options: tla (the assigner), classes, settings, policy (with an assigner) and card, see `save_bundle`; and
                options of `huggingface_hub.ModelHubMixin.push_to_hub`: commit_message, private, token, branch,
                create_pr, allow_patterns, ignore_patterns, delete_patterns.

        Returns:
            The address of the commit.

        Raises:
            ImportError: where huggingface_hub is not installed.
            TypeError, ValueError: for an unknown option; see `save_bundle`.
        """
        parts = {name: options.pop(name) for name in PARTS if name in options}
        foreign = [name for name in ("config", "model_card_kwargs") if name in options]
        if foreign:
            raise TypeError(f"{foreign[0]}: a bundle has its own; expected {', '.join(PARTS)} and those of an upload")
        return _uploader(lambda folder: self._write(folder, parts)).push_to_hub(repo_id, **options)

    def _write(self, folder: str | os.PathLike, parts: Mapping[str, Any]) -> None:
        rest = dict(parts)
        assigner, policy = rest.pop("tla", None), rest.get("policy")
        if assigner is not None:
            check_assigner(assigner, self.grids)
            if policy is not None:
                assigner.check_policy(policy, [forward_macs(self, n) for n in self.lengths])
        elif policy is not None:
            raise ValueError(
                f"policy: {policy!r} is not of the model; give the assigner too (tla=...), or save both with "
                "revit_fast.save_bundle(folder, model, policy=...)"
            )
        write_folder(folder, self, assigner, **rest)

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        match_norms: str = "length",
        **arguments: Any,
    ) -> M:
        """A saved model, in evaluation mode; `revit_fast.load` also loads its assigner and policy.

        Args:
            pretrained_model_name_or_path: a folder; the name of a model that the package ships; or a repository of the
                Hub, "user/name", with or without the prefix "hf-hub:" and the suffix "@revision".
            revision: branch, tag or commit of the repository.
            cache_dir: where downloads are kept; by default huggingface_hub's.
            token: access token of the Hub; by default that of the login.
            force_download: whether to download files again that are already there.
            local_files_only: whether to use only files that are already there.
            match_norms: how norms go to other grids, see `ReViT.load_weights`.
            **arguments: constructor arguments that replace the saved ones, for example drop_path_rate.

        Raises:
            FileNotFoundError: where a file is missing.
            ImportError, OSError: see `download`.
            ValueError: where a file cannot be read, or files or arguments do not fit each other; the message names it.
        """
        name = pretrained_model_name_or_path
        if not isinstance(name, str) or Path(name).is_dir():
            folder = Path(name)
        elif name in shipped_names():
            folder = SHIPPED / name
        else:
            options = {"cache_dir": cache_dir, "token": token, "force_download": force_download}
            folder = download(name, revision=revision, local_files_only=local_files_only, **options)
        return read_model(find_bundle(folder), cls, arguments, match_norms=match_norms)


def find_bundle(name_or_folder: str | os.PathLike) -> Path:
    """The folder of a saved model.

    Args:
        name_or_folder: see `revit_fast.streaming.bundle.read_bundle`.

    Raises:
        FileNotFoundError: if there is none.
        ImportError, OSError: see `download`.
    """
    if isinstance(name_or_folder, str) and name_or_folder.startswith(SCHEME):
        name_or_folder = download(name_or_folder)
    if not is_bundle(name_or_folder):
        shipped = ", ".join(shipped_names()) or "none"
        here = "; for the folder here, give ./" + name_or_folder if Path(name_or_folder).is_dir() else ""
        raise FileNotFoundError(
            f"bundle: the package ships no model {name_or_folder!r}; shipped: {shipped}; a folder is given with a "
            f"path separator{here}"
        )
    folder = Path(name_or_folder) if _is_path(name_or_folder) else SHIPPED / name_or_folder
    if not (folder / CONFIG).is_file():
        what = f"lacks {CONFIG}" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"bundle: the folder {folder} {what}; save_bundle and `revit-fast fit` write bundles")
    return folder


def is_bundle(name_or_folder: str | os.PathLike) -> bool:
    """Whether this is a path, a repository or the name of a shipped model, and not that of a timm architecture."""
    return _is_path(name_or_folder) or name_or_folder.startswith(SCHEME) or name_or_folder in shipped_names()


def shipped_names() -> list[str]:
    """Names of the models that the package ships."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def _is_path(name_or_folder: str | os.PathLike) -> bool:
    separators = [os.sep, os.altsep or os.sep]
    return not isinstance(name_or_folder, str) or any(s in name_or_folder for s in separators)


def download(repo_id: str, *, revision: str | None = None, **options: Any) -> Path:
    """The folder that holds a repository's files, downloaded now or earlier.

    Args:
        repo_id: "user/name", with or without the prefix "hf-hub:" and the suffix "@revision".
        revision: branch, tag or commit.
        **options: options of `huggingface_hub.snapshot_download`: cache_dir, token, force_download, local_files_only,
            ...

    Raises:
        ImportError: where huggingface_hub is not installed.
        OSError: if the Hub does not provide the repository; the message says why.
    """
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
    """An instance of huggingface_hub's mixin that uploads the files that `write` puts into a folder."""

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
