"""Bundles: what is written runs without the DSL, and what is wrong with one is said."""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cute_fa import sim
from cute_fa.build import aot, bundle, manifest, presets, registry
from cute_fa.build.bundle import Bundle
from cute_fa.build.compile import compile
from cute_fa.build.resources import KernelResources
from cute_fa.errors import (
    BundleError,
    CompileError,
    InvalidArgumentError,
    InvalidTypeError,
    MissingToolError,
    UnsupportedError,
)
from cute_fa.problem import AttentionProblem, KernelVariant
from cute_fa.target import get_target

D64 = KernelVariant("float16", 64, 64)
D128 = KernelVariant("float16", 128, 128)


def _wishes() -> list[presets.Wish]:
    return [
        presets.Wish(D64, ("tiny",)),
        presets.Wish(D128, ("tiny",)),
        presets.Wish(D64, ("tiny",), {"factor": 3.0}),
        presets.Wish(KernelVariant("float16", 64, 64, has_softcap=True), ("tiny",)),
    ]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where these tests' kernels are compiled once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def write(
    tiny: Any, shared_cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Bundle]:
    """Write a bundle of the tests' own kernel; without the runtime library unless asked."""
    monkeypatch.setenv("CUTE_FA_CACHE_DIR", shared_cache)
    table = {"few": presets.Preset("tests", lambda: iter(_wishes()))}
    monkeypatch.setattr(presets, "PRESETS", table)

    def call(**options: Any) -> Bundle:
        options = {"archs": ["sm_80", "sm_90a"], "with_runtime": False, "jobs": 1, **options}
        output = options.pop("output", tmp_path / "bundle")
        return aot.write_bundle(output, presets=["few"], **options).bundle

    return call


def test_its_kernels_are_those_of_the_compiler(write: Callable[..., Bundle]) -> None:
    made = write()
    assert made.archs == ("sm_80", "sm_90a")
    assert [(k.arch, k.variant.head_dim, k.role) for k in made.kernels] == [
        ("sm_80", 64, "default"),
        ("sm_90a", 64, "default"),
        ("sm_80", 128, "default"),
        ("sm_90a", 128, "default"),
        ("sm_80", 64, "candidate"),
        ("sm_90a", 64, "candidate"),
    ]
    kernel = made.kernel("tiny", "sm_90a", D64)
    compiled = compile("tiny", arch="sm_90a", dtype="half", head_dim=64)
    assert kernel.ptx == compiled.ptx and kernel.config == compiled.config
    assert (kernel.label, kernel.key) == (compiled.label, compiled.key)
    assert kernel.resources == compiled.resources.as_dict()
    [(what, reason)] = {tuple(each.values()) for each in made.document["left_out"][:1]}
    assert what == "tiny fwd sm_80 float16 d64 softcap" and "no softcap" in reason


def test_its_launch_code_runs_in_the_simulator(write: Callable[..., Bundle]) -> None:
    """Without the GPU's machine code, of which only the library has all."""
    made = write(archs=["sm_80"])
    cubin = compile("tiny", arch="sm_80", dtype="half", head_dim=64).cubin
    library, launch_code = (
        next(made.folder.glob(f"kernels/{made.kernels[0].name}{end}")) for end in (".so", ".o.xz")
    )
    assert cubin in library.read_bytes()
    assert cubin[:64] in lzma.decompress(launch_code.read_bytes())
    assert cubin not in lzma.decompress(launch_code.read_bytes())
    x = torch.arange(300.0)
    for kernel, factor in ((made.kernels[0], 2.0), (made.kernels[2], 3.0)):
        y = torch.full_like(x, torch.nan)
        sim.Device("sm_80").bind(kernel.host("sim"), kernel.ptx)(x, y)
        assert torch.equal(y, factor * x)


WITHOUT_DSL = """
import sys

class NoDsl:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cutlass", "nvidia_cutlass_dsl", "cuda", "numpy"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, NoDsl())
sys.path.insert(0, sys.argv[2])
from cute_fa.build import registry
import tiny_registry
registry.KERNELS = (*registry.KERNELS, tiny_registry.TINY)
from cute_fa.build.bundle import Bundle
from cute_fa.errors import MissingToolError
bundle = Bundle(sys.argv[1])
for kernel in bundle.kernels:
    kernel.load_library()
try:
    bundle.kernels[0].host("cuda")
except MissingToolError as error:
    print(error.what)
"""


def test_it_loads_where_there_is_no_dsl_and_no_compiler(
    write: Callable[..., Bundle], tmp_path: Path
) -> None:
    """With its own runtime library, moved to another place, and with no tool on the PATH."""
    made = write(with_runtime=True, archs=["sm_80"])
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    made.folder.rename(moved)
    kernels = Path(__file__).parent / "kernels"
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_DSL, str(moved), str(kernels)]
    root = str(Path(__file__).parents[2])
    environment = {"PATH": "", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stderr == ""
    if bundle.cuda_driver_version() is None:
        assert (
            result.stdout.strip() == "there is no CUDA driver, so no kernel can run on a GPU here"
        )


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_and_missing_files_are_all_named(write: Callable[..., Bundle]) -> None:
    folder = write(archs=["sm_80"]).folder
    library, ptx, launch_code = (
        next(folder.glob(f"kernels/*{end}")) for end in (".so", ".ptx.xz", ".o.xz")
    )
    _damage(library)
    ptx.unlink()
    launch_code.write_bytes(launch_code.read_bytes()[:-1])
    with pytest.raises(BundleError, match="a bundle is damaged") as caught:
        Bundle(folder)
    message = str(caught.value)
    assert f"{library.name} does not match its checksum" in message
    assert f"{ptx.name} is missing" in message
    assert f"{launch_code.name} has" in message
    assert "make or copy the bundle again" in message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"cute_fa": "0.0.9"}, "another version of cute_fa(.|\n)*0.0.9"),
        ({"toolchain": {"platform": "linux riscv64"}}, "another platform"),
        ({"toolchain": {"tvm_ffi": "0.2.0"}}, "does not serve this bundle"),
        ({"toolchain": {"tvm_ffi": "0.1.999"}}, "does not serve this bundle"),
        ({"runtime": {"sha256": "0" * 64}}, "not the one that this bundle was linked against"),
    ],
)
def test_versions_that_do_not_fit(
    write: Callable[..., Bundle], change: dict[str, Any], what: str
) -> None:
    made = write(archs=["sm_80"])
    document = {
        name: {**made.document[name], **value} if isinstance(value, dict) else value
        for name, value in change.items()
    }
    manifest.seal(made.folder, {**made.document, **document})
    with pytest.raises(BundleError, match=what):
        Bundle(made.folder)


def test_a_bundle_of_another_format_or_with_an_altered_manifest(
    write: Callable[..., Bundle],
) -> None:
    folder = write(archs=["sm_80"]).folder
    path = folder / manifest.NAME
    whole = path.read_text()
    path.write_text(whole.replace('"format": 1', '"format": 7'))
    with pytest.raises(BundleError, match=r"another format(.|\n)*format 7"):
        Bundle(folder)
    path.write_text(whole.replace('"candidate"', '"default"'))
    with pytest.raises(BundleError, match="do not match its digest"):
        Bundle(folder)
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match="the manifest of a bundle is damaged"):
        Bundle(folder)
    path.unlink()
    with pytest.raises(BundleError, match="this is not a bundle"):
        Bundle(folder)


@pytest.mark.parametrize("key", manifest.KEYS)
def test_a_whole_manifest_that_lacks_something(write: Callable[..., Bundle], key: str) -> None:
    """Of another version it is said that it is; of this one, what it lacks."""
    folder = write(archs=["sm_80"]).folder
    path = folder / manifest.NAME

    def refused(**changes: Any) -> str:
        document = {**json.loads(whole), **changes}
        document.pop(key, None)
        document.pop("digest")
        path.write_text(json.dumps({**document, "digest": manifest._digest(document)}))
        with pytest.raises(BundleError) as caught:
            Bundle(folder)
        return str(caught.value)

    whole = path.read_text()
    assert f"no {key}\n" in refused()
    if key != "cute_fa":
        assert "another version" in refused(cute_fa="0.0.9")


def test_paths_that_are_no_bundle(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    app = tmp_path / "app"
    app.mkdir()
    (app / manifest.NAME).write_text('{"name": "an app", "icons": []}')
    for path, got in (
        (tmp_path / "nowhere", "no directory"),
        (file, "no directory"),
        (tmp_path, f"no usable {manifest.NAME}"),
        (app, f"a {manifest.NAME} of something else"),
    ):
        with pytest.raises(BundleError, match="this is not a bundle") as caught:
            Bundle(path)
        assert str(path) in str(caught.value) and got in str(caught.value)
    for value in (None, 3, ["bundle"]):
        with pytest.raises(InvalidTypeError, match="no path"):
            Bundle(value)  # type: ignore[arg-type]


def test_a_kernel_that_these_sources_do_not_know(write: Callable[..., Bundle]) -> None:
    made = write(archs=["sm_80"])
    document = json.loads(json.dumps(made.document))
    document["kernels"][0]["config"]["fields"]["new_field"] = 3
    manifest.seal(made.folder, document)
    with pytest.raises(BundleError, match=r"does not know(.|\n)*new_field"):
        Bundle(made.folder)
    document = json.loads(json.dumps(made.document))
    document["kernels"][0]["arch"] = "sm_999"
    manifest.seal(made.folder, document)
    with pytest.raises(BundleError, match=r"does not know(.|\n)*sm_999"):
        Bundle(made.folder)


def test_the_sources_of_a_bundle_are_those_that_were_compiled(
    write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may change meanwhile."""
    digests = ["before"]

    def compile_and_change(*arguments: Any) -> Any:
        digests.append("behind")
        return compile_all(*arguments)

    compile_all = aot._compile
    monkeypatch.setattr(aot, "_compile", compile_and_change)
    monkeypatch.setattr(aot.keys, "source_digest", lambda packages: digests[-1])
    made = write(archs=["sm_80"])
    assert made.document["sources"] == "before"
    assert "it was made by other sources" in made.notes()[0]


def test_the_runtime_library_is_missing(
    write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write(archs=["sm_80"])

    def none() -> Path:
        raise MissingToolError("the CuTe DSL is not installed")

    monkeypatch.setattr(bundle, "runtime_library", none)
    with pytest.raises(MissingToolError, match="made without the runtime library"):
        Bundle(made.folder)


def _problem(**changes: Any) -> AttentionProblem:
    sizes = {"head_dim": 64, "head_dim_v": 64, **changes}
    return AttentionProblem(1, 8, 8, 1, 1, dtype="float16", **sizes)


def test_which_kernel_serves(write: Callable[..., Bundle]) -> None:
    made = write()
    hopper, ada, blackwell = (get_target(arch) for arch in ("sm_90a", "sm_89", "sm_100a"))
    assert made.choose_generation(_problem(), hopper, "tiny") == "tiny"
    assert made.kernel("tiny", "sm_90a", D64).arch == "sm_90a"
    # Machine code for 8.0 runs on 8.9; code for 9.0a on nothing but 9.0.
    assert made.kernel("tiny", "sm_89", D64).arch == "sm_80"
    with pytest.raises(UnsupportedError, match=r"runs on this architecture(.|\n)*sm_80, sm_90a"):
        made.choose_generation(_problem(), blackwell, "tiny")
    with pytest.raises(UnsupportedError, match=r"no kernel for the problem(.|\n)*d128"):
        made.choose_generation(_problem(head_dim=72), ada, "tiny")
    with pytest.raises(UnsupportedError, match=r"no kernel for the problem(.|\n)*tiny"):
        made.choose_generation(_problem(), ada, "fa2")
    with pytest.raises(UnsupportedError, match="no kernel"):  # "tiny" is only for who asks
        made.choose_generation(_problem(), ada, "auto")


def test_shared_memory_decides_too(
    write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"few": presets.Preset("", lambda: iter([presets.Wish(D64, ("tiny",), big)]))}
    big = {"smem_bytes": 120 * 1024}
    monkeypatch.setattr(presets, "PRESETS", table)
    made = write(archs=["sm_80"])
    assert len(made.candidates("tiny", get_target("sm_80"), D64)) == 1
    assert made.candidates("tiny", get_target("sm_86"), D64) == ()


def test_tuned_choices_are_taken(write: Callable[..., Bundle]) -> None:
    folder = write(archs=["sm_80"]).folder
    default, _, candidate = Bundle(folder).kernels
    assert Bundle(folder).kernel("tiny", "sm_80", D64).role == "default"
    choice = {"label": candidate.label, "kernel": candidate.name}
    (folder / bundle.TUNED).write_text(
        json.dumps({"device": {"name": "a GPU"}, "choices": [choice]})
    )
    tuned = Bundle(folder)
    assert (Bundle(folder).notes(), default.config.factor) == (
        ["default kernels replaced by tuned.json, which was tuned on a GPU: 1"],
        2.0,
    )
    assert tuned.kernel("tiny", "sm_80", D64).name == candidate.name != default.name
    assert tuned.kernel("tiny", "sm_80", D128).role == "default"
    choice["kernel"] = "no-such-kernel"
    (folder / bundle.TUNED).write_text(
        json.dumps({"device": {"name": "a GPU"}, "choices": [choice]})
    )
    with pytest.raises(BundleError, match=r"tuned kernels(.|\n)*no-such-kernel"):
        Bundle(folder)


def test_the_driver_must_be_new_enough(
    write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write(archs=["sm_80"])
    major = int(made.document["toolchain"]["flavour"].removeprefix("cu"))
    monkeypatch.setattr(bundle, "cuda_driver_version", lambda: (major - 1, 8))
    with pytest.raises(BundleError, match=rf"too old(.|\n)*CUDA {major - 1}.8"):
        bundle.check_driver(made)
    monkeypatch.setattr(bundle, "cuda_driver_version", lambda: (major, 0))
    assert bundle.check_driver(made) == (major, 0)


# --- writing


def test_nothing_but_a_bundle_is_replaced(write: Callable[..., Bundle], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    for name in ("file", "full"):
        with pytest.raises(BundleError, match="in the way"):
            write(archs=["sm_80"], output=tmp_path / name)
    (tmp_path / "empty").mkdir()
    first = write(archs=["sm_80"], output=tmp_path / "empty")
    second = write(archs=["sm_90a"], output=tmp_path / "empty")
    assert (first.archs, second.archs) == (("sm_80",), ("sm_90a",))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_else_lies_there_is_not_lost(write: Callable[..., Bundle], tmp_path: Path) -> None:
    """A project with a manifest of its own, a bundle that notes were put into, and links."""
    app = tmp_path / "app"
    app.mkdir()
    (app / manifest.NAME).write_text('{"name": "an app"}')
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("app", "dangling"):
        with pytest.raises(BundleError, match="in the way"):
            write(archs=["sm_80"], output=tmp_path / name)
    made = write(archs=["sm_80"])
    (made.folder / bundle.TUNED).write_text("{}")
    (made.folder / "kernels" / "notes.txt").write_text("precious")
    with pytest.raises(BundleError, match="something else in it") as e:
        write(archs=["sm_80"])
    assert "got:      kernels/notes.txt\n" in str(e.value)
    (made.folder / "kernels" / "notes.txt").unlink()
    link = tmp_path / "link"
    link.symlink_to(made.folder)
    again = write(archs=["sm_90a"], output=link)
    assert link.is_symlink() and again.folder == made.folder and again.archs == ("sm_90a",)
    assert not (made.folder / bundle.TUNED).exists()


def test_a_place_that_cannot_be_written_is_known_before_compiling(
    write: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*args: Any) -> None:
        raise AssertionError("it was compiled first")

    monkeypatch.setattr(aot, "_compile", compiled)
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(BundleError, match=r"cannot be written here(.|\n)*file"):
        write(archs=["sm_80"], output=tmp_path / "file" / "bundle")


def test_a_disk_that_is_full(
    write: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write(archs=["sm_80"])

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(aot.shutil, "copyfile", full)
    with pytest.raises(BundleError, match=r"could not be written(.|\n)*No space left"):
        write(archs=["sm_90a"], with_runtime=True)
    assert Bundle(before.folder).archs == ("sm_80",)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_failure_leaves_the_old_bundle(write: Callable[..., Bundle], tmp_path: Path) -> None:
    before = write(archs=["sm_80"])

    def fail(folder: Path, unfinished: Bundle) -> dict[str, Any]:
        assert unfinished.kernels and folder != before.folder
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write(archs=["sm_90a"], extend=fail)
    assert Bundle(before.folder).document == before.document
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_extension_adds_files_and_says_so(write: Callable[..., Bundle]) -> None:
    def extend(folder: Path, unfinished: Bundle) -> dict[str, Any]:
        (folder / "notes.txt").write_text("more")
        return {"notes": len(unfinished.kernels)}

    made = write(archs=["sm_80"], extend=extend)
    assert made.document["notes"] == 3 and "notes.txt" in made.document["files"]
    (made.folder / "notes.txt").write_text("less")
    with pytest.raises(BundleError, match=r"notes.txt does not match"):
        Bundle(made.folder)


def test_nothing_of_this_machine_is_in_a_library(write: Callable[..., Bundle]) -> None:
    made = write(archs=["sm_80"])
    for path in made.folder.rglob("*.so"):
        data = path.read_bytes()
        assert b"$ORIGIN/../runtime" in data
        assert str(Path.home()).encode() not in data and sys.prefix.encode() not in data


def test_bad_selections(tiny: Any, tmp_path: Path) -> None:
    for archs, names, what in (
        (["sm_80"], ["no-such"], "unknown preset(.|\n)*benchmark"),
        (["sm_42"], ["check"], "unknown architecture"),
        ([], ["check"], "needs an architecture"),
    ):
        with pytest.raises(InvalidArgumentError, match=what):
            aot.write_bundle(tmp_path / "bundle", archs=archs, presets=names)
    assert not (tmp_path / "bundle").exists()


def test_a_candidate_that_does_not_compile_is_left_out(
    write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    def preset(*wishes: presets.Wish) -> None:
        table = {"few": presets.Preset("", lambda: iter(wishes))}
        monkeypatch.setattr(presets, "PRESETS", table)

    bad = presets.Wish(D64, ("tiny",), {"fault": "raise"})
    preset(presets.Wish(D64, ("tiny",)), bad)
    made = write(archs=["sm_80"])
    assert [kernel.role for kernel in made.kernels] == ["default"]
    [left_out] = made.document["left_out"]
    assert "'fault': 'raise'" in left_out["what"] and "broken" in left_out["reason"]
    preset(bad)
    with pytest.raises(CompileError, match=r"no candidate is of use(.|\n)*broken"):
        write(archs=["sm_80"])


def test_a_candidate_that_spills_is_left_out(
    write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default that spills is what there is, and stays."""
    monkeypatch.setattr(KernelResources, "spills", True)
    made = write(archs=["sm_80"])
    assert {kernel.role for kernel in made.kernels} == {"default"}
    reasons = [each["reason"] for each in made.document["left_out"] if "factor" in each["what"]]
    assert len(reasons) == 1 and "it spills registers" in reasons[0]


def test_an_architecture_that_nothing_is_compiled_for(write: Callable[..., Bundle]) -> None:
    arch, why = next(iter(registry.NOT_COMPILED.items()))
    made = write(archs=["sm_80", arch])
    assert made.archs == ("sm_80",)
    assert {"what": arch, "reason": why} in made.document["left_out"]
    with pytest.raises(UnsupportedError, match="no kernel serves") as caught:
        write(archs=[arch])
    assert why in str(caught.value)


def test_a_preset_that_nothing_serves(
    write: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    softcap = presets.Wish(KernelVariant("float16", 64, 64, has_softcap=True), ("tiny",))
    table = {"few": presets.Preset("", lambda: iter([softcap]))}
    monkeypatch.setattr(presets, "PRESETS", table)
    with pytest.raises(UnsupportedError, match=r"no kernel serves(.|\n)*no softcap"):
        write(archs=["sm_80"])
    shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
