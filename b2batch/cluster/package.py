"""What a submitted job takes along: the job as one file, and the small files that it or its author names.

The job is written out in full (overrides, model fragments, the text of processors, schemas, examples), with
absolute paths, so that it means on the cluster what it meant here. Data and weights never travel.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from modulefinder import ModuleFinder
from pathlib import Path
from typing import IO, Any

import yaml

from b2batch.assets import EMBEDDED_MODELS
from b2batch.errors import CallerError
from b2batch.spec import MAX_JOB_FILE_BYTES, JobSpec

MAX_PACKAGE_BYTES = 100 << 20  # what the dashboard takes as the body of one request
JOB_FILE = "b2batch-job.yaml"
_EXAMPLES_FILE = "b2batch-examples.jsonl"
_SHOWN_FILES = 3
_INSTALLED = {"site-packages", "dist-packages"}
_SKIPPED_DIRECTORIES = {"__pycache__", "node_modules"}
_LEFT_OUT_IF_THERE_IS = ("pyvenv.cfg", "__b2batch")  # a virtual environment, an output of b2batch
_MOST_COMPRESSION = 10  # beyond this it is not worth trying
_DATA_AND_WEIGHTS = (
    *(".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".parquet", ".csv", ".tsv", ".arrow", ".feather"),
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".npy", ".npz", ".pkl"),
)


@dataclass(frozen=True, slots=True)
class Package:
    """A zip for the working directory of a job's driver and replicas. ``files`` are the names in it."""

    content: bytes
    files: tuple[str, ...]


class _Dumper(yaml.SafeDumper):
    """Job files have no aliases, so a value that occurs twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """As YAML likes; in quotes what is not printed, of which PyYAML would fold the line breaks."""
        is_printed = all(char.isprintable() or char == "\n" for char in text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_printed else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def make_package(spec: JobSpec, working_dir: Path | None) -> Package:
    """The job file, the modules of its processors that are not installed, and what is in ``working_dir``.

    Of ``working_dir``, hidden files (so ``.git`` too), data, weights and outputs of b2batch stay here.

    Raises:
        CallerError: more than the cluster takes; the largest files are named.
    """
    paths = {**_module_files(spec), **(_files_below(working_dir.absolute()) if working_dir else {})}
    _check_size({name: path.stat().st_size for name, path in paths.items()}, _MOST_COMPRESSION)
    content = {name: path.read_bytes() for name, path in paths.items()} | _job_files(spec)
    packed = io.BytesIO()
    _check_size(_zip(content, packed))
    return Package(packed.getvalue(), tuple(content))


def portable_document(spec: JobSpec) -> dict[str, Any]:
    """The job as a document that means the same in any directory, on the cluster that runs it."""
    document = spec.model_dump(mode="json")
    document["input"]["path"] = absolute_paths(spec.input.path)
    document["output"]["path"] = absolute_path(spec.output.path)
    document["cluster"]["address"] = "auto"
    if _is_directory(spec.model.model):
        document["model"]["model"] = absolute_path(spec.model.model)
    if spec.model.adapter is not None and _is_directory(spec.model.adapter):
        document["model"]["adapter"] = absolute_path(spec.model.adapter)
    return document


def absolute_paths(paths: tuple[str, ...]) -> list[str]:
    """``absolute_path`` of each."""
    return [absolute_path(path) for path in paths]


def absolute_path(path: str) -> str:
    """A path as seen from this directory; URIs, and what begins with ``${env:``, mean the same anywhere."""
    if "://" in path or path.startswith("${env:"):
        return path
    return str(Path(path).expanduser().absolute())


def _is_directory(name: str) -> bool:
    """Whether a model's or adapter's name is a directory here, as the cluster is to find it too."""
    return name not in EMBEDDED_MODELS and Path(name).expanduser().is_dir()


def _job_files(spec: JobSpec) -> dict[str, bytes]:
    """The job's own files. Examples may be larger than a job file, and stand in a file of their own."""
    document = portable_document(spec)
    files = {}
    if examples := document["prompt"]["examples"]:
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        files[_EXAMPLES_FILE] = "".join(lines).encode()
        document["prompt"]["examples"] = _EXAMPLES_FILE
    text = yaml.dump(document, Dumper=_Dumper, allow_unicode=True, sort_keys=False).encode()
    if len(text) > MAX_JOB_FILE_BYTES:
        raise CallerError(
            f"the job with its schema and processors has {len(text)} bytes, more than a job file may have"
            f" ({MAX_JOB_FILE_BYTES}): let the processors import what is large, and give --working-dir"
        )
    return {JOB_FILE: text, **files}


def _module_files(spec: JobSpec) -> dict[str, Path]:
    """Name → file of the modules that processors import and that are not installed."""
    functions = [spec.preprocess.function, spec.postprocess.function]
    files: dict[str, Path] = {}
    for function in functions:
        if function is not None:
            files |= _imported_files(function.partition(":")[0])
    return files


def _imported_files(module: str) -> dict[str, Path]:
    found = find_spec(module)
    if found is None or found.origin is None:
        return {}
    root = Path(found.origin).parents[len(module.split(".")) - 1 + (Path(found.origin).stem == "__init__")]
    if _INSTALLED & set(root.parts):
        return {}
    finder = ModuleFinder(path=[str(root)])  # nothing else is looked into, so nothing installed is found
    try:
        finder.import_hook(module)
    except SyntaxError as error:
        raise CallerError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    names = [getattr(each, "__file__", None) for each in finder.modules.values()]
    paths = [Path(name) for name in names if name]
    return {path.relative_to(root).as_posix(): path for path in paths}


def _files_below(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        raise CallerError(f"--working-dir: {directory} is neither a directory nor a URI such as s3://…/x.zip")
    return {path.relative_to(directory).as_posix(): path for path in _walk(directory)}


def _walk(directory: Path) -> Iterator[Path]:
    """Files in a fixed order, without what does not travel; links to directories are not followed."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in _SKIPPED_DIRECTORIES:
            continue
        if path.is_dir() and not path.is_symlink():
            if not any((path / mark).exists() for mark in _LEFT_OUT_IF_THERE_IS):
                yield from _walk(path)
        elif path.is_file() and not path.name.lower().endswith(_DATA_AND_WEIGHTS):
            yield path


def _zip(content: Mapping[str, bytes], target: IO[bytes]) -> dict[str, int]:
    """Write the archive and tell each file's size in it.

    Equal files give equal bytes, so that a cluster that has the package is not sent it again.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
        return {entry.filename: entry.compress_size for entry in archive.infolist()}


def _check_size(sizes: Mapping[str, int], most_compression: int = 1) -> None:
    num_bytes = sum(sizes.values())
    if num_bytes <= MAX_PACKAGE_BYTES * most_compression:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_SHOWN_FILES]
    shown = ", ".join(f"{name} ({_mib(sizes[name])})" for name in largest)
    raise CallerError(
        f"the package has {_mib(num_bytes)} in {len(sizes)} files, and Ray takes {_mib(MAX_PACKAGE_BYTES)}; "
        f"the largest: {shown}. Name a smaller --working-dir, or one that is a zip in object storage: "
        "s3://…/x.zip"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"
