"""A network on a GPU, or on what stands in for one: the answers are those of the CPU, however pictures come."""

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


def net(transform: object = SMALL) -> backbones.Backbone:
    return backbones.load(Tiny(), transform=transform)


def pictures(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    return [picture.permute(2, 0, 1) for picture in made]


def by_the_cpu(network: backbones.Backbone, images: Sequence[Tensor]) -> np.ndarray:
    exact = Engine(network, CPU)
    return np.concatenate([exact.embed(exact.collate([exact.transform(image)]))["pooled"] for image in images])


def handed(device: torch.device, images: Sequence[Tensor], transform: object = SMALL) -> list[Tensor | UnresizedImage]:
    hand_over = PinnedTransfer(transform, device)
    return [hand_over(image) for image in images]


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 8, 64])
def test_a_gpu_gives_the_embeddings_of_the_cpu_whether_pictures_come_in_one_tensor_by_themselves_or_unresized(
    gpu, batch
):
    network, images = net(), pictures()
    expected = by_the_cpu(network, images)
    made = Engine(network, gpu, batch=batch)
    unresized = [made.transform(image) for image in images]
    assert {type(picture) for picture in unresized} == {Tensor, UnresizedImage}
    resized = [SMALL.prepare(image) for image in images]
    for given in (torch.stack(resized), resized, made.collate(resized), made.collate(unresized)):
        assert near(made.embed(given)["pooled"], expected)


def test_batches_that_are_begun_before_others_are_waited_for_keep_their_answers(gpu):
    network, images = net(), pictures(SIZES * 5)
    made = Engine(network, gpu, batch=8)
    waiting = [made.transform(image) for image in images]
    batches = [made.collate(waiting[start : start + 8]) for start in range(0, len(waiting), 8)]
    begun = [made.submit(batch) for batch in batches]
    together = np.concatenate([answer()["pooled"] for answer in begun])
    assert near(together, by_the_cpu(network, images))
    alone = np.concatenate([made.embed(batch)["pooled"] for batch in batches])
    assert np.array_equal(together, alone)


class Deciding(Tiny):
    """Waits for a value, which a graph cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() < 1e9 else x.mean((2, 3))


def test_a_network_that_cannot_be_captured_is_called(gpu):
    network = backbones.load(Deciding(), transform=SMALL)
    made = Engine(network, gpu, batch=4)
    found = made.embed([made.transform(image) for image in pictures()])["pooled"]
    assert near(found, by_the_cpu(network, pictures()))
    assert made._runner._graph is None


def test_on_an_emulated_gpu_a_network_that_can_be_captured_is_replayed(monkeypatch):
    seen = emulate_gpu(monkeypatch)
    made = Engine(net(), torch.device("cuda"), batch=4)
    assert made.name == "torch on an emulated GPU"
    made.embed([made.transform(image) for image in pictures()])
    assert [graph.replays for graph in seen.graphs] == [3]


def test_on_an_emulated_gpu_a_graph_that_does_not_fit_is_captured_of_fewer_images(monkeypatch):
    seen, forward = emulate_gpu(monkeypatch), Tiny.forward

    def crowded(self, x):
        if seen.graph is not None and len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)

    monkeypatch.setattr(Tiny, "forward", crowded)
    network = net()
    made = Engine(network, torch.device("cuda"), batch=8)
    found = made.embed([made.transform(image) for image in pictures()])["pooled"]
    assert (made.batch, seen.graphs[-1].replays) == (2, 6)
    assert near(found, by_the_cpu(network, pictures()))


ROOM_FOR = {
    "begin": (CudaRunner, "_submit_batch", 2),
    "resize": (MatmulResizer, "resize", 1),
    "network": (Tiny, "forward", 2),
}


@pytest.mark.parametrize("where", ROOM_FOR)
def test_a_batch_that_does_not_fit_is_halved_and_no_row_is_lost(gpu, monkeypatch, where):
    owner, name, most = ROOM_FOR[where]
    real = getattr(owner, name)

    def crowded(self, some, *rest):
        if len(some) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, some, *rest)

    network, images = net(), pictures()
    expected = by_the_cpu(network, images)
    made = Engine(network, gpu, batch=8)
    given = [made.transform(image) for image in images]
    begun = made.submit(given)
    monkeypatch.setattr(owner, name, crowded)
    made._runner._halve_batch()
    for _ in range(2):
        assert near(made.embed(given)["pooled"], expected)
        assert made.batch == 2
    assert near(begun()["pooled"], expected)


def test_an_image_that_does_not_fit_alone_is_an_error_that_says_what_to_do(gpu, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = Engine(net(), gpu, batch=4)
    monkeypatch.setattr(MatmulResizer, "resize", full)
    with pytest.raises(ConfigError, match=r"a single image needs more memory than cuda.*--device cpu"):
        made.embed([made.transform(image) for image in pictures()])


TRANSFORMS = {
    "cover": SMALL,
    "cover and pad": Transform(12, (16, 20)),
    "as they are": Transform(None, (16, 16)),
    "squash": Transform((16, 18), (16, 18), mode="squash"),
    "border": Transform((16, 18), (16, 18), "bicubic", mode="border"),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_what_the_network_sees_is_the_transforms_picture_to_the_bit(gpu, kind):
    transform = TRANSFORMS[kind]
    made = CudaRunner(backbones.load(Tiny(), transform=transform), 32, "fp32", gpu)
    given = handed(gpu, pictures(), transform)
    assert any(isinstance(picture, UnresizedImage) for picture in given) == (kind != "as they are")
    places = torch.full((32, *transform.size, 3), 7, dtype=torch.uint8).to(gpu).permute(0, 3, 1, 2)
    with torch.inference_mode():
        made._copy_images(places, given)
    for place, image in zip(places.cpu(), pictures(), strict=False):
        assert torch.equal(place, transform.prepare(image))
    assert (places[len(given) :] == 7).all()


def test_many_pictures_of_a_size_are_resized_in_several_products(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "max_resize_batch", lambda *_: 3)
    counts, resize = [], MatmulResizer.resize
    monkeypatch.setattr(
        MatmulResizer, "resize", lambda self, some, *rest: counts.append(len(some)) or resize(self, some, *rest)
    )
    made, images = CudaRunner(net(), 32, "fp32", gpu), pictures([(40, 50), (50, 40)] * 8)
    given = handed(gpu, images)
    counts.clear()  # of what was tried
    places = torch.zeros((32, 16, 16, 3), dtype=torch.uint8).to(gpu).permute(0, 3, 1, 2)
    with torch.inference_mode():
        made._copy_images(places, given)
    assert sorted(counts) == [2, 2, 3, 3, 3, 3]
    for place, image in zip(places.cpu(), images, strict=False):
        assert torch.equal(place, SMALL.prepare(image))


def test_on_an_emulated_gpu_each_stream_waits_for_what_it_reads_and_memory_for_the_streams_that_use_it(monkeypatch):
    seen, used = emulate_gpu(monkeypatch), []
    made = Engine(net(), torch.device("cuda"), batch=4)._runner
    fill, normalise = CudaRunner._copy_images, Transform.normalize

    def filled(self, places, images):
        slot = next(slot for slot in made._buffers if slot.images is places)
        assert seen.streams[-1] is made._copy_stream
        assert made._copy_stream.waited_for[-1] is slot.free
        assert slot.free.recorded_on is made._compute_stream
        used.append(slot)
        fill(self, places, images)

    def read(self, batch):
        if used and used[-1].images is batch:
            assert seen.streams[-1] is made._compute_stream
            assert made._compute_stream.waited_for[-1] is used[-1].copied
            assert used[-1].copied.recorded_on is made._copy_stream
        return normalise(self, batch)

    monkeypatch.setattr(CudaRunner, "_copy_images", filled)
    monkeypatch.setattr(Transform, "normalize", read)
    made.submit(handed(torch.device("cuda"), pictures()))()
    assert used == [used[0], used[1], used[0]]
    for slot in used[:2]:
        assert set(seen.used_on[slot.images.data_ptr()]) == {made._copy_stream, made._compute_stream}


def test_tf32_is_off_while_pictures_are_resized_and_on_where_the_network_may_use_it(gpu, monkeypatch):
    allowed: dict[str, set[bool]] = {"resize": set(), "forward": set()}
    for owner, name in ((MatmulResizer, "resize"), (Tiny, "forward")):
        real = getattr(owner, name)

        def noting(self, *given, real=real, name=name):
            allowed[name].add(torch.backends.cuda.matmul.allow_tf32)
            return real(self, *given)

        monkeypatch.setattr(owner, name, noting)
    before = torch.backends.cuda.matmul.allow_tf32
    made = Engine(net(), gpu, "tf32", batch=4)
    allowed["forward"].clear()  # of the count of its work
    made.embed([made.transform(image) for image in pictures()])
    assert allowed == {"resize": {False}, "forward": {True}}
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_on_an_emulated_gpu_what_is_handed_over_is_pinned_and_only_what_the_result_needs(monkeypatch):
    seen = emulate_gpu(monkeypatch)
    transform = Transform(20, (16, 16))
    made = handed(torch.device("cuda"), pictures([(40, 80), (80, 100), (16, 16), (20, 20)]), transform)
    assert [isinstance(picture, UnresizedImage) for picture in made] == [True, True, True, False]
    for picture in made:
        pixels = picture.pixels if isinstance(picture, UnresizedImage) else picture
        assert pixels.data_ptr() in seen.pinned
        assert pixels.permute(1, 2, 0).is_contiguous()
    assert made[0].pixels.shape == (3, 34, 34)  # 32 pixels that become 16, and one at each side


@pytest.mark.parametrize(
    ("size", "transform", "unresized"),
    [
        ((40, 330), SMALL, True),
        ((40, 330), net(tiny_transform).transform, False),  # nobody knows what it does
        ((1600, 1600), SMALL, False),  # 160 pixels count for one
        ((70, 20), Transform((16, 16), (16, 16), mode="squash"), False),  # some versions of Pillow begin with columns
        ((70, 44), Transform((16, 16), (16, 16), mode="squash"), True),
        ((20, 30), SMALL, False),  # as large as it is to be
        ((70, 90), Transform((70, 89), (16, 16), mode="squash"), True),
        ((1600, 1500), Transform((800, 801), (800, 800), mode="squash"), False),  # much to keep in memory
    ],
)
def test_the_cores_resize_what_a_gpu_would_not_to_the_bit_or_at_a_price(gpu, size, transform, unresized):
    image = torch.full((3, *size), 200, dtype=torch.uint8)
    (picture,) = handed(gpu, [image], transform)
    assert isinstance(picture, UnresizedImage) == unresized
    assert unresized or torch.equal(picture, transform.prepare(image))


def test_a_gpu_that_is_not_exact_is_given_resized_pictures(gpu, monkeypatch):
    monkeypatch.setattr(pinned_transfer, "is_exact", lambda device: False)
    assert all(isinstance(picture, Tensor) for picture in handed(gpu, pictures()))
    made = Engine(net(), gpu, batch=4)
    assert near(made.embed([made.transform(image) for image in pictures()])["pooled"], by_the_cpu(net(), pictures()))


def test_what_waits_unresized_has_so_much_room_and_no_more(gpu, monkeypatch):
    monkeypatch.setattr(pinned_transfer, "MAX_PENDING_BYTES", 3 * 8192)
    hand_over, (image,) = PinnedTransfer(SMALL, gpu), pictures([(40, 50)])
    made = [hand_over(image) for _ in range(5)]  # 42 × 42 pixels at most, of three bytes
    assert [isinstance(picture, UnresizedImage) for picture in made] == [True] * 3 + [False] * 2
    del made[0]
    assert isinstance(hand_over(image), UnresizedImage)
    assert isinstance(hand_over(image), UnresizedImage)  # the one before it is gone already
    made.append(hand_over(image))
    assert [type(hand_over(image)), type(made[-1])] == [Tensor, UnresizedImage]


def test_a_picture_that_is_too_long_and_thin_is_refused_as_on_the_cpu(gpu):
    with pytest.raises(SampleError, match="too long and thin"):
        PinnedTransfer(Transform(256, (224, 224)), gpu)(torch.zeros((3, 1, 2000), dtype=torch.uint8))


@pytest.fixture
def mixed(tmp_path):
    """Photographs of several sizes, some of them broken, and one twice."""
    folder = tmp_path / "mixed"
    for label in ("ape", "bee"):
        (folder / label).mkdir(parents=True)
        for number, (height, width) in enumerate(SIZES * 2):
            (folder / label / f"{number:02}.jpg").write_bytes(jpeg(number + ord(label[0]), (width, height)))
    (folder / "ape" / "03.jpg").write_bytes(jpeg(3)[:150])
    (folder / "bee" / "07.jpg").write_bytes(b"")
    (folder / "bee" / "08.jpg").write_bytes((folder / "ape" / "08.jpg").read_bytes())
    return folder


@pytest.mark.parametrize("transform", [SMALL, tiny_transform], ids=["ours", "one's own"])
def test_an_extraction_on_a_gpu_has_the_rows_of_one_on_the_cpu(
    gpu, mixed, tmp_path, request, monkeypatch, transform, log
):
    settings = {"backbone": net(transform), "batch": 8, "engine": "torch"}
    threads, resize = set(), MatmulResizer.resize
    monkeypatch.setattr(
        MatmulResizer, "resize", lambda *given: threads.add(threading.current_thread()) or resize(*given)
    )
    exact = extract(mixed, out=tmp_path / "cpu.h5", device="cpu", **settings)
    found = extract(mixed, out=tmp_path / "gpu" / "gpu.h5", device="cuda", workers=3, **settings)
    assert found.manifest["facts"] == exact.manifest["facts"]
    assert (list(found.ids), list(found.status)) == (list(exact.ids), list(exact.status))
    assert sorted(set(map(str, exact.status))) == ["damaged", "empty", "ok"]
    if "emulated" in request.node.name:
        assert found.features().tobytes() == exact.features().tobytes()
    assert np.allclose(found.features(), exact.features(), rtol=1e-4, atol=1e-5, equal_nan=True)
    # TF32 is a setting of the process: one thread alone changes it.
    assert threads == ({threading.current_thread()} if transform is SMALL else set())
    assert all(found.manifest["seconds"][step] > 0 for step in ("decoding", "embedding"))


def test_what_a_machine_with_a_gpu_allows_is_measured_as_its_cores_and_its_gpu_work_then(gpu, make_folder, monkeypatch):
    seen: dict[str, list[type]] = {"decoding": [], "forward": []}
    hand_over, fill = PinnedTransfer.__call__, CudaRunner._copy_images

    def decoded(*given):
        picture = hand_over(*given)
        seen["decoding"].append(type(picture))
        return picture

    def filled(self, places, images):
        seen["forward"].extend(map(type, images))
        fill(self, places, images)

    monkeypatch.setattr(PinnedTransfer, "__call__", decoded)
    monkeypatch.setattr(CudaRunner, "_copy_images", filled)
    monkeypatch.setattr(bench._Benchmark, "measure_extraction", lambda *_: (100.0, {}))
    found = run_benchmark([make_folder()], backbone=net(), device="cuda", seconds=0.5, batch=8)
    assert found.machine["gpu"] == torch.cuda.get_device_name()
    assert set(seen["decoding"]) == set(seen["forward"]) == {UnresizedImage}
    steps = found.reading, found.writing / found.row_bytes, found.decoding, found.forward[0].images_per_second
    assert found.bound == min(steps)
    assert {way.precision for way in found.forward} == {"fp32", *candidate_precisions(gpu)}
