"""`infer`: images, arrays or JSON in; labels, numbers or JSON out.

Law of this file: it makes inputs from what is on the command line, runs them through `Client`, and
prints. Image arithmetic is in client/images.py. numpy is imported here, when the command is run.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_runtime import tensors
from edge_runtime.cli import arguments as args
from edge_runtime.cli import output, tensor_json
from edge_runtime.clock import SystemClock
from edge_runtime.errors import NotFoundError, RequestError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    import numpy as np

    Array = np.ndarray[Any, Any]
    Arrays = Mapping[str, Array]

TIMEOUT_S = 10.0  # of one request; --timeout changes it
JSON_BYTES_MAX = 64 << 20  # as one frame: tensors as text are for trying things out
STDIN = "-"


class Timed(NamedTuple):
    """The last answer, and the middle of what all of them took, in microseconds."""

    outputs: Arrays
    version: str
    round_trip_us: float
    server_us: float


def add_parser(subparsers: Any) -> None:
    """Add the parser of `infer`."""
    parser = subparsers.add_parser(
        "infer",
        description="Run a model. Without --image, --npy or --json FILE, shows what it takes.",
    )
    parser.add_argument(
        "target", metavar="NAME", type=name_and_version, help="the model, or NAME@VERSION"
    )
    source = parser.add_argument_group("what to run it on (one of)")
    source.add_argument("--image", nargs="+", type=Path, metavar="FILE", help="image files")
    source.add_argument("--npy", type=Path, metavar="FILE", help="a .npy array or .npz of inputs")
    source.add_argument(
        "--json",
        dest="json_source",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help='Open Inference Protocol JSON: {"inputs": [...]}; - reads stdin. '
        "Without FILE: print the answer as JSON",
    )
    parser.add_argument(
        "--input", default="", metavar="NAME", help="the input for --image or --npy"
    )
    parser.add_argument("--top", type=args.count, default=0, metavar="K", help="how many labels")
    parser.add_argument(
        "--repeat",
        type=args.count,
        default=1,
        metavar="N",
        help="run N times, show the median time",
    )
    args.add_global(parser, json=False)
    parser.set_defaults(handler=_infer)


def _infer(arguments: argparse.Namespace) -> int:
    arguments.json = arguments.json or arguments.json_source is not False
    given = [arguments.image, arguments.npy, isinstance(arguments.json_source, str) or None]
    if sum(source is not None for source in given) > 1:
        raise UsageError(
            "--image, --npy and --json FILE exclude each other",
            remedy="to print the answer as JSON, write --json before `infer` or at the end",
        )
    with _Session(arguments) as session:
        if arguments.image is not None:
            return _infer_images(session, arguments)
        if arguments.npy is not None:
            return _infer_npy(session, arguments)
        if isinstance(arguments.json_source, str):
            return _infer_json(session, arguments)
        return _show_model(session, arguments)


class _Session:
    """A client and the model that was named: runs it `--repeat` times and takes the time."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.name, self.version = arguments.target
        self._repeat = arguments.repeat
        self._timeout_s = arguments.timeout_s or TIMEOUT_S
        self._path = arguments.run_dir / "infer.sock"

    def __enter__(self) -> _Session:
        from edge_runtime.client import Client

        self._client = Client(self._path, timeout_s=self._timeout_s)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def metadata(self) -> Mapping[str, Any]:
        return self._client.metadata(self.name, version=self.version)

    def run(self, inputs: Arrays, outputs: Sequence[str] | None = None) -> Timed:
        clock = SystemClock()
        round_trips, servers = [], []
        for _ in range(self._repeat):
            start_ns = clock.monotonic_ns()
            result = self._client.infer_result(
                self.name, inputs, outputs=outputs, version=self.version
            )
            round_trips.append((clock.monotonic_ns() - start_ns) / 1000)
            servers.append(result.server_ns / 1000)
        middle = [statistics.median(values) for values in (round_trips, servers)]
        return Timed(result.outputs, result.model_version, *middle)


# --- images -------------------------------------------------------------------------------------


def _infer_images(session: _Session, arguments: argparse.Namespace) -> int:
    from edge_runtime.client import images

    metadata = session.metadata()
    name, preprocess = images.preprocess_of(metadata, arguments.input)
    postprocess = images.postprocess_of(metadata)
    tensor = next(item for item in metadata["inputs"] if item["name"] == name)
    results = []
    for path in arguments.image:
        array = images.load(path, preprocess, tensor["datatype"], tensor["shape"])
        timed = session.run({name: array})
        chosen = _output(timed.outputs, postprocess.output)
        answers = images.classify(chosen, postprocess, arguments.top)
        results.append((path, answers, timed))
    if arguments.json:
        output.print_json(_images_document(session.name, results))
    else:
        print(_images_text(results))
    return 0


def _output(outputs: Arrays, name: str) -> Array:
    if name and name not in outputs:
        raise RequestError(
            f"the model gave no output {name!r}", expected="one of " + ", ".join(outputs)
        )
    return outputs[name] if name else next(iter(outputs.values()))


def _images_text(results: list[tuple[Path, list[Any], Timed]]) -> str:
    rows: list[tuple[Any, ...]] = []
    for path, answers, timed in results:
        first: tuple[Any, ...] = (path, f"{timed.round_trip_us:.0f}", f"{timed.server_us:.0f}")
        for answer in answers:
            rows.append((first[0], answer.label, f"{answer.confidence:.4f}", *first[1:]))
            first = ("", "", "")  # the image and its times stand beside its best label only
    headers = ("IMAGE", "LABEL", ">CONFIDENCE", ">ROUND TRIP µs", ">IN SERVER µs")
    return output.table(headers, rows, output.terminal_columns(sys.stdout))


def _images_document(name: str, results: list[tuple[Path, list[Any], Timed]]) -> dict[str, Any]:
    return {
        "model_name": name,
        "model_version": results[0][2].version,
        "results": [
            {
                "image": str(path),
                "classes": answers,
                "round_trip_us": round(timed.round_trip_us, 1),
                "server_us": round(timed.server_us, 1),
            }
            for path, answers, timed in results
        ],
    }


# --- arrays -------------------------------------------------------------------------------------


def _infer_npy(session: _Session, arguments: argparse.Namespace) -> int:
    inputs = read_arrays(arguments.npy)
    if "" in inputs:  # a lone array: the input that was named, or the first
        name = arguments.input or session.metadata()["inputs"][0]["name"]
        inputs = {name: inputs[""]}
    timed = session.run(inputs)
    if arguments.json:
        output.print_json(tensor_json.document(session.name, timed.version, timed.outputs))
        return 0
    import numpy as np

    for name, array in timed.outputs.items():
        print(f"{output.printable(name)}: {tensors.datatype_of(array.dtype)} {list(array.shape)}")
        print(np.array2string(array, threshold=200, precision=6, suppress_small=True))
    print(f"{timed.round_trip_us:.0f} µs, {timed.server_us:.0f} µs of them in the server")
    return 0


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of a .npz by name, or that of a .npy under the name "".

    Raises:
        NotFoundError, UsageError: no such file, or not one of the two. Pickled objects are refused.
    """
    import zipfile

    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        return {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except FileNotFoundError as error:
        raise NotFoundError("there is no such file", where=str(path)) from error
    # numpy's reader evaluates a header and believes its sizes: it raises what that runs into
    except (
        *(OSError, ValueError, EOFError, SyntaxError, LookupError, TypeError, MemoryError),
        zipfile.BadZipFile,
    ) as error:
        raise UsageError(
            "cannot be read as an array: "
            # numpy would recommend what we never do
            + ("it is none, or holds objects" if "pickle" in str(error) else str(error)),
            where=str(path),
            expected="a .npy or .npz file of numbers",
        ) from error


# --- JSON ---------------------------------------------------------------------------------------


def _infer_json(session: _Session, arguments: argparse.Namespace) -> int:
    source = arguments.json_source
    request = tensor_json.parse(_read(source), "stdin" if source == STDIN else source)
    timed = session.run(tensor_json.arrays(request), tensor_json.output_names(request))
    document = tensor_json.document(session.name, timed.version, timed.outputs, request.id)
    output.print_json(document)
    return 0


def _read(source: str) -> bytes:
    try:
        if source == STDIN:
            data = sys.stdin.buffer.read(JSON_BYTES_MAX + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(JSON_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise NotFoundError("there is no such file", where=source) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read: {error}", where=source) from error
    if len(data) > JSON_BYTES_MAX:
        raise UsageError(
            "the JSON is too large",
            where=source,
            expected=f"at most {output.size(JSON_BYTES_MAX)}",
            remedy="give large tensors with --npy",
        )
    return data


# --- the model itself ---------------------------------------------------------------------------


def _show_model(session: _Session, arguments: argparse.Namespace) -> int:
    metadata = session.metadata()
    if arguments.json:
        output.print_json(metadata)
        return 0
    rows = [
        (kind, item["name"], item["datatype"], list(item["shape"]))
        for kind in ("inputs", "outputs")
        for item in metadata.get(kind) or ()
    ]
    print(output.table(("", "NAME", "DATATYPE", "SHAPE"), rows, None))
    print("to run it: --image FILE, --npy FILE or --json FILE")
    return 0


def name_and_version(text: str) -> tuple[str, str]:
    """`NAME` or `NAME@VERSION`; the active version is ""."""
    if "@" not in text:
        return text, ""
    name, version = args.name_at_version(text)
    return name, str(version)
