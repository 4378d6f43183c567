"""Inference on a GPU, real or emulated, gives the embeddings of the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from featpipe import backbones, bench, extract
from featpipe.backbones import Transform
from featpipe.backbones.resize.matmul import MatmulResizer, UnresizedImage
from featpipe.bench import run_benchmark
from featpipe.errors import ConfigError, SampleError
from featpipe.inference import Engine, candidate_precisions, cuda, pinned_transfer
from featpipe.inference.cuda import CudaRunner
from featpipe.inference.pinned_transfer import PinnedTransfer
from tests.support.emulated_gpu import emulate_gpu
from tests.support.images import jpeg
from tests.support.networks import Tiny, tiny_transform

CPU = torch.device("cpu")
SMALL = Transform(20, (16, 16), "bicubic")
SIZES = [(40, 50), (50, 40), (40, 50), (16, 16), (20, 20), (12, 90), (90, 12), (300, 31), (33, 47), (40, 50), (8, 8)]


def small_backbone(transform: object = SMALL) -> backbones.Backbone:
    return backbones.load(Tiny(), transform=transform)


def random_images(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    return [array.permute(2, 0, 1) for array in arrays]


def compute_cpu_embeddings(backbone: backbones.Backbone, images: Sequence[Tensor]) -> np.ndarray:
    engine = Engine(backbone, CPU)
    return np.concatenate([engine.embed(engine.collate([engine.transform(image)]))["pooled"] for image in images])


def transfer_images(
    device: torch.device, images: Sequence[Tensor], transform: object = SMALL
) -> list[Tensor | UnresizedImage]:
    transfer = PinnedTransfer(transform, device)
    return [transfer(image) for image in images]


def is_close(actual: np.ndarray, expected: np.ndarray) -> bool:
    return actual.shape == expected.shape and np.allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 8, 64])
def test_a_gpu_gives_the_cpus_embeddings_for_batched_separate_and_unresized_images(gpu, batch):
    backbone, images = small_backbone(), random_images()
    expected = compute_cpu_embeddings(backbone, images)
    engine = Engine(backbone, gpu, batch=batch)
    unresized = [engine.transform(image) for image in images]
    assert {type(picture) for picture in unresized} == {Tensor, UnresizedImage}
    resized = [SMALL.prepare(image) for image in images]
    for engine_input in (torch.stack(resized), resized, engine.collate(resized), engine.collate(unresized)):
        assert is_close(engine.embed(engine_input)["pooled"], expected)


def test_overlapping_batches_keep_their_embeddings(gpu):
    backbone, images = small_backbone(), random_images(SIZES * 5)
    engine = Engine(backbone, gpu, batch=8)
    prepared = [engine.transform(image) for image in images]
    batches = [engine.collate(prepared[start : start + 8]) for start in range(0, len(prepared), 8)]
    pending = [engine.submit(batch) for batch in batches]
    overlapped = np.concatenate([wait()["pooled"] for wait in pending])
    assert is_close(overlapped, compute_cpu_embeddings(backbone, images))
    sequential = np.concatenate([engine.embed(batch)["pooled"] for batch in batches])
    assert np.array_equal(overlapped, sequential)


class SynchronizingNetwork(Tiny):
    """Reads a value from the device, which a CUDA graph cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() < 1e9 else x.mean((2, 3))


def test_a_network_that_cannot_be_captured_runs_eagerly(gpu):
    backbone = backbones.load(SynchronizingNetwork(), transform=SMALL)
    engine = Engine(backbone, gpu, batch=4)
    embeddings = engine.embed([engine.transform(image) for image in random_images()])["pooled"]
    assert is_close(embeddings, compute_cpu_embeddings(backbone, random_images()))
    assert engine._runner._graph is None


def test_on_an_emulated_gpu_a_network_that_can_be_captured_is_replayed(monkeypatch):
    emulated = emulate_gpu(monkeypatch)
    engine = Engine(small_backbone(), torch.device("cuda"), batch=4)
    assert engine.name == "torch on an emulated GPU"
    engine.embed([engine.transform(image) for image in random_images()])
    assert [graph.replays for graph in emulated.graphs] == [3]


def test_on_an_emulated_gpu_a_graph_that_does_not_fit_is_captured_with_a_smaller_batch(monkeypatch):
    emulated, forward = emulate_gpu(monkeypatch), Tiny.forward

    def forward_if_small(self, x):
        if emulated.graph is not None and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(Tiny, "forward", forward_if_small)
    backbone = small_backbone()
    engine = Engine(backbone, torch.device("cuda"), batch=8)
    embeddings = engine.embed([engine.transform(image) for image in random_images()])["pooled"]
    assert (engine.batch, emulated.graphs[-1].replays) == (2, 6)
    assert is_close(embeddings, compute_cpu_embeddings(backbone, random_images()))


MAX_IMAGES_OF_STEP = {
    "begin": (CudaRunner, "_submit_batch", 2),
    "resize": (MatmulResizer, "resize", 1),
    "network": (Tiny, "forward", 2),
}


@pytest.mark.parametrize("step", MAX_IMAGES_OF_STEP)
def test_a_batch_that_does_not_fit_is_halved_and_no_row_is_lost(gpu, monkeypatch, step):
    owner, name, max_images = MAX_IMAGES_OF_STEP[step]
    original = getattr(owner, name)

    def run_if_small(self, batch_images, *arguments):
        if len(batch_images) > max_images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch_images, *arguments)

    backbone, images = small_backbone(), random_images()
    expected = compute_cpu_embeddings(backbone, images)
    engine = Engine(backbone, gpu, batch=8)
    engine_input = [engine.transform(image) for image in images]
    wait = engine.submit(engine_input)
    monkeypatch.setattr(owner, name, run_if_small)
    engine._runner._halve_batch()
    for _ in range(2):
        assert is_close(engine.embed(engine_input)["pooled"], expected)
        assert engine.batch == 2
    assert is_close(wait()["pooled"], expected)


def test_a_single_image_that_does_not_fit_is_refused_with_advice(gpu, monkeypatch):
    def raise_out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = Engine(small_backbone(), gpu, batch=4)
    monkeypatch.setattr(MatmulResizer, "resize", raise_out_of_memory)
    with pytest.raises(ConfigError, match=r"a single image needs more memory than cuda.*--device cpu"):
        engine.embed([engine.transform(image) for image in random_images()])


TRANSFORMS = {
    "cover": SMALL,
    "cover and pad": Transform(12, (16, 20)),
    "without resizing": Transform(None, (16, 16)),
    "squash": Transform((16, 18), (16, 18), mode="squash"),
    "border": Transform((16, 18), (16, 18), "bicubic", mode="border"),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_the_network_input_is_bit_identical_to_the_transform(gpu, kind):
    transform = TRANSFORMS[kind]
    runner = CudaRunner(backbones.load(Tiny(), transform=transform), 32, "fp32", gpu)
    transferred = transfer_images(gpu, random_images(), transform)
    assert any(isinstance(picture, UnresizedImage) for picture in transferred) == (kind != "without resizing")
    buffer = torch.full((32, *transform.size, 3), 7, dtype=torch.uint8).to(gpu).permute(0, 3, 1, 2)
    with torch.inference_mode():
        runner._copy_images(buffer, transferred)
    for row, image in zip(buffer.cpu(), random_images(), strict=False):
        assert torch.equal(row, transform.prepare(image))
    assert (buffer[len(transferred) :] == 7).all()


def test_many_images_of_one_size_are_resized_in_several_products(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "max_resize_batch", lambda *_: 3)
    counts, resize = [], MatmulResizer.resize
    monkeypatch.setattr(
        MatmulResizer,
        "resize",
        lambda self, pixels, *arguments: counts.append(len(pixels)) or resize(self, pixels, *arguments),
    )
    runner, images = CudaRunner(small_backbone(), 32, "fp32", gpu), random_images([(40, 50), (50, 40)] * 8)
    transferred = transfer_images(gpu, images)
    counts.clear()  # those of the exactness check
    buffer = torch.zeros((32, 16, 16, 3), dtype=torch.uint8).to(gpu).permute(0, 3, 1, 2)
    with torch.inference_mode():
        runner._copy_images(buffer, transferred)
    assert sorted(counts) == [2, 2, 3, 3, 3, 3]
    for row, image in zip(buffer.cpu(), images, strict=False):
        assert torch.equal(row, SMALL.prepare(image))


def test_on_an_emulated_gpu_each_stream_waits_for_its_inputs_and_memory_for_its_streams(monkeypatch):
    emulated, used_buffers = emulate_gpu(monkeypatch), []
    runner = Engine(small_backbone(), torch.device("cuda"), batch=4)._runner
    copy_images, normalize = CudaRunner._copy_images, Transform.normalize

    def check_copy(self, destination, images):
        buffer = next(buffer for buffer in runner._buffers if buffer.images is destination)
        assert emulated.streams[-1] is runner._copy_stream
        assert runner._copy_stream.waited_for[-1] is buffer.free
        assert buffer.free.recorded_on is runner._compute_stream
        used_buffers.append(buffer)
        copy_images(self, destination, images)

    def check_normalize(self, batch):
        if used_buffers and used_buffers[-1].images is batch:
            assert emulated.streams[-1] is runner._compute_stream
            assert runner._compute_stream.waited_for[-1] is used_buffers[-1].copied
            assert used_buffers[-1].copied.recorded_on is runner._copy_stream
        return normalize(self, batch)

    monkeypatch.setattr(CudaRunner, "_copy_images", check_copy)
    monkeypatch.setattr(Transform, "normalize", check_normalize)
    runner.submit(transfer_images(torch.device("cuda"), random_images()))()
    assert used_buffers == [used_buffers[0], used_buffers[1], used_buffers[0]]
    for buffer in used_buffers[:2]:
        assert set(emulated.used_on[buffer.images.data_ptr()]) == {runner._copy_stream, runner._compute_stream}


def test_tf32_is_off_during_resizing_and_on_in_the_network(gpu, monkeypatch):
    allowed: dict[str, set[bool]] = {"resize": set(), "forward": set()}
    for owner, name in ((MatmulResizer, "resize"), (Tiny, "forward")):
        original = getattr(owner, name)

        def record(self, *arguments, original=original, name=name):
            allowed[name].add(torch.backends.cuda.matmul.allow_tf32)
            return original(self, *arguments)

        monkeypatch.setattr(owner, name, record)
    before = torch.backends.cuda.matmul.allow_tf32
    engine = Engine(small_backbone(), gpu, "tf32", batch=4)
    allowed["forward"].clear()  # those of counting multiply-adds
    engine.embed([engine.transform(image) for image in random_images()])
    assert allowed == {"resize": {False}, "forward": {True}}
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_on_an_emulated_gpu_only_the_needed_pixels_are_transferred_in_pinned_memory(monkeypatch):
    emulated = emulate_gpu(monkeypatch)
    transform = Transform(20, (16, 16))
    transferred = transfer_images(
        torch.device("cuda"), random_images([(40, 80), (80, 100), (16, 16), (20, 20)]), transform
    )
    assert [isinstance(picture, UnresizedImage) for picture in transferred] == [True, True, True, False]
    for picture in transferred:
        pixels = picture.pixels if isinstance(picture, UnresizedImage) else picture
        assert pixels.data_ptr() in emulated.pinned
        assert pixels.permute(1, 2, 0).is_contiguous()
    assert transferred[0].pixels.shape == (3, 34, 34)  # 32 pixels that become 16, and one more on each side


@pytest.mark.parametrize(
    ("size", "transform", "unresized"),
    [
        ((40, 330), SMALL, True),
        ((40, 330), small_backbone(tiny_transform).transform, False),  # a custom transform runs entirely on the CPU
        ((1600, 1600), SMALL, False),  # 160 taps are too many
        ((70, 20), Transform((16, 16), (16, 16), mode="squash"), False),  # Pillow may resize the columns first
        ((70, 44), Transform((16, 16), (16, 16), mode="squash"), True),
        ((20, 30), SMALL, False),  # needs no resizing
        ((70, 90), Transform((70, 89), (16, 16), mode="squash"), True),
        ((1600, 1500), Transform((800, 801), (800, 800), mode="squash"), False),  # more than MAX_UNRESIZED_PIXELS
    ],
)
def test_images_that_a_gpu_cannot_resize_exactly_or_cheaply_are_resized_on_the_cpu(gpu, size, transform, unresized):
    image = torch.full((3, *size), 200, dtype=torch.uint8)
    (picture,) = transfer_images(gpu, [image], transform)
    assert isinstance(picture, UnresizedImage) == unresized
    assert unresized or torch.equal(picture, transform.prepare(image))


def test_a_gpu_that_is_not_exact_gets_resized_images(gpu, monkeypatch):
    monkeypatch.setattr(pinned_transfer, "is_exact", lambda device: False)
    assert all(isinstance(picture, Tensor) for picture in transfer_images(gpu, random_images()))
    engine = Engine(small_backbone(), gpu, batch=4)
    assert is_close(
        engine.embed([engine.transform(image) for image in random_images()])["pooled"],
        compute_cpu_embeddings(small_backbone(), random_images()),
    )


def test_pending_unresized_images_are_limited_in_bytes(gpu, monkeypatch):
    monkeypatch.setattr(pinned_transfer, "MAX_PENDING_BYTES", 3 * 8192)
    transfer, (image,) = PinnedTransfer(SMALL, gpu), random_images([(40, 50)])
    transferred = [transfer(image) for _ in range(5)]  # at most 42 × 42 pixels of three bytes
    assert [isinstance(picture, UnresizedImage) for picture in transferred] == [True] * 3 + [False] * 2
    del transferred[0]
    assert isinstance(transfer(image), UnresizedImage)
    assert isinstance(transfer(image), UnresizedImage)  # the previous one was freed
    transferred.append(transfer(image))
    assert [type(transfer(image)), type(transferred[-1])] == [Tensor, UnresizedImage]


def test_an_image_that_is_too_long_and_thin_is_refused_as_on_the_cpu(gpu):
    with pytest.raises(SampleError, match="too long and thin"):
        PinnedTransfer(Transform(256, (224, 224)), gpu)(torch.zeros((3, 1, 2000), dtype=torch.uint8))


@pytest.fixture
def mixed_photos(tmp_path):
    """Photographs of several sizes; two cannot be decoded, and one is a copy."""
    folder = tmp_path / "mixed"
    for label in ("ape", "bee"):
        (folder / label).mkdir(parents=True)
        for number, (height, width) in enumerate(SIZES * 2):
            (folder / label / f"{number:02}.jpg").write_bytes(jpeg(number + ord(label[0]), (width, height)))
    (folder / "ape" / "03.jpg").write_bytes(jpeg(3)[:150])
    (folder / "bee" / "07.jpg").write_bytes(b"")
    (folder / "bee" / "08.jpg").write_bytes((folder / "ape" / "08.jpg").read_bytes())
    return folder


@pytest.mark.parametrize("transform", [SMALL, tiny_transform], ids=["library", "custom"])
def test_an_extraction_on_a_gpu_has_the_rows_of_one_on_the_cpu(
    gpu, mixed_photos, tmp_path, request, monkeypatch, transform, log
):
    settings = {"backbone": small_backbone(transform), "batch": 8, "engine": "torch"}
    threads, resize = set(), MatmulResizer.resize
    monkeypatch.setattr(
        MatmulResizer, "resize", lambda *arguments: threads.add(threading.current_thread()) or resize(*arguments)
    )
    cpu_cache = extract(mixed_photos, out=tmp_path / "cpu.h5", device="cpu", **settings)
    gpu_cache = extract(mixed_photos, out=tmp_path / "gpu" / "gpu.h5", device="cuda", workers=3, **settings)
    assert gpu_cache.manifest["facts"] == cpu_cache.manifest["facts"]
    assert (list(gpu_cache.ids), list(gpu_cache.status)) == (list(cpu_cache.ids), list(cpu_cache.status))
    assert sorted(set(map(str, cpu_cache.status))) == ["damaged", "empty", "ok"]
    if "emulated" in request.node.name:
        assert gpu_cache.features().tobytes() == cpu_cache.features().tobytes()
    assert np.allclose(gpu_cache.features(), cpu_cache.features(), rtol=1e-4, atol=1e-5, equal_nan=True)
    # TF32 is a setting of the process, so only one thread may change it.
    assert threads == ({threading.current_thread()} if transform is SMALL else set())
    assert all(gpu_cache.manifest["seconds"][step] > 0 for step in ("decoding", "embedding"))


def test_the_benchmark_of_a_gpu_measures_unresized_images(gpu, make_folder, monkeypatch):
    image_types: dict[str, list[type]] = {"decoding": [], "forward": []}
    transfer, copy_images = PinnedTransfer.__call__, CudaRunner._copy_images

    def record_decoded(*arguments):
        image = transfer(*arguments)
        image_types["decoding"].append(type(image))
        return image

    def record_copied(self, destination, images):
        image_types["forward"].extend(map(type, images))
        copy_images(self, destination, images)

    monkeypatch.setattr(PinnedTransfer, "__call__", record_decoded)
    monkeypatch.setattr(CudaRunner, "_copy_images", record_copied)
    monkeypatch.setattr(bench._Benchmark, "measure_extraction", lambda *_: (100.0, {}))
    result = run_benchmark([make_folder()], backbone=small_backbone(), device="cuda", seconds=0.5, batch=8)
    assert result.machine["gpu"] == torch.cuda.get_device_name()
    assert set(image_types["decoding"]) == set(image_types["forward"]) == {UnresizedImage}
    stage_rates = (
        result.reading,
        result.writing / result.row_bytes,
        result.decoding,
        result.forward[0].images_per_second,
    )
    assert result.bound == min(stage_rates)
    assert {forward.precision for forward in result.forward} == {"fp32", *candidate_precisions(gpu)}
