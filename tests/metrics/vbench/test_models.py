"""What goes into the learned models, where weights are looked for, and what is said when they are missing."""

import importlib.util

import footage
import pytest
import torch

from videosparse.metrics.vbench import DIMENSIONS, Context, MissingError, Models, Weights
from videosparse.metrics.vbench.models import CLIP, IMAGENET, centre, normalised, shorter_side
from videosparse.metrics.vbench.weights import NEEDED
from videosparse.metrics.video import as_video


def nowhere(folder):
    return Weights(folder, download=False)


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


def pretend_installed(monkeypatch, *names):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in names else real(name))


def pretend_absent(monkeypatch, *names):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in names else real(name))


def test_features_do_not_depend_on_batches(models, weights_folder):
    video = footage.pan(2, frames=9)
    one = Models(nowhere(weights_folder), batch=1)
    for key in ("dino", "clip-b32"):
        found = models.features(key, video)
        assert torch.allclose(found, one.features(key, video), atol=1e-5)
        assert torch.allclose(found.norm(dim=-1), torch.ones(9), atol=1e-5)


def test_dino_sees_the_whole_frame_and_clip_its_middle(models):
    """Frames twice as wide as high: only their outer quarters differ."""
    wide = footage.texture(64, 128)[None].repeat(2, 1, 1, 1)
    wide[1, :, :, :28] = wide[1, :, :, 100:] = 0
    video = as_video(wide, 16)
    clip, dino = models.features("clip-b32", video), models.features("dino", video)
    assert torch.allclose(clip[0], clip[1], atol=1e-5)
    assert not torch.allclose(dino[0], dino[1], atol=1e-3)


def test_dino_takes_its_class_token_of_normalised_pixels(models):
    frame = torch.full((2, 3, 224, 224), 0.5)
    frame[:, 0] = 1
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    levels = (frame * 255).round() / 255
    with torch.inference_mode():
        hidden = models.load("dino")((levels - mean) / deviation, interpolate_pos_encoding=True).last_hidden_state
    expected = torch.nn.functional.normalize(hidden[:, 0], dim=-1)
    assert torch.allclose(models.features("dino", as_video(frame, 16)), expected, atol=1e-5)


def test_preparation_equals_that_of_pillow():
    """Pillow resizes as torchvision's anti-aliased resize does, up to its rounding to levels."""
    image = pytest.importorskip("PIL.Image")
    frame = footage.texture(90, 160)
    pillow = image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().numpy())
    for mode, resample in (("bilinear", image.BILINEAR), ("bicubic", image.BICUBIC)):
        ours = shorter_side((frame * 255).round()[None] / 255, 45, mode)
        assert list(ours.shape) == [1, 3, 45, 80]
        theirs = torch.frombuffer(bytearray(pillow.resize((80, 45), resample).tobytes()), dtype=torch.uint8)
        theirs = theirs.view(45, 80, 3).permute(2, 0, 1) / 255
        assert (ours[0].clamp(0, 1) - theirs).abs().max() < 1.5 / 255
    assert centre(torch.arange(10.0).expand(1, 3, 8, 10), 6)[0, 0, 0].tolist() == [2, 3, 4, 5, 6, 7]
    assert normalised(torch.tensor(CLIP[0]).view(1, 3, 1, 1), CLIP).abs().max() == 0


@pytest.mark.usefixtures("no_cache")
def test_missing_models_are_named_with_what_to_do(tmp_path):
    for folder, words in ((tmp_path, [f"neither in {tmp_path} nor in the cache"]), (None, ["then pass --weights DIR"])):
        with pytest.raises(MissingError) as caught:
            Models(nowhere(folder)).load("dino")
        told = str(caught.value)
        assert "\n" not in told
        for word in ("facebook/dino-vitb16", "config.json", "model.safetensors", "hf download", "downloads are off"):
            assert word in told
        assert all(word in told for word in words)
    with pytest.raises(MissingError, match=r"sa_0_4_vit_l_14_linear.pth is neither .* fetch https://github.com/LAION"):
        Models(nowhere(tmp_path)).load("laion-head")


@pytest.mark.usefixtures("no_cache")
def test_missing_files_of_optional_packages(tmp_path, monkeypatch):
    pretend_absent(monkeypatch, "torchvision", "pyiqa", "lpips")
    for key, word in (("raft", "torchvision"), ("musiq", "pyiqa and torchvision"), ("vgg16", "lpips and torchvision")):
        with pytest.raises(MissingError, match=rf"{key} needs {word}: pip install -e .\.\[vbench\]"):
            nowhere(tmp_path).file(key)
    pretend_installed(monkeypatch, "torchvision")
    with pytest.raises(MissingError, match=r"raft_large_C_T_V1-22a6c225.pth is neither in"):
        nowhere(tmp_path).file("raft")


def test_files_are_found_in_the_folder_then_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    name = NEEDED["laion-head"].name
    cached = tmp_path / "hub" / "checkpoints" / name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x")
    assert nowhere(tmp_path).file("laion-head") == cached
    (tmp_path / name).write_bytes(b"x")
    assert nowhere(tmp_path).file("laion-head") == tmp_path / name


def test_the_network_is_asked_last(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    asked = []

    def fetch(address, path, progress):
        asked.append(address)
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    with pytest.raises(MissingError, match="cannot be downloaded"):
        Weights(tmp_path).file("laion-head")
    assert asked == [NEEDED["laion-head"].source]


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def load(name, local_files_only):
        asked.append((name, local_files_only))
        raise OSError("We couldn't connect") from LocalEntryNotFoundError("not in the cache")

    weights = Weights(tmp_path)
    with pytest.raises(MissingError, match=r"the hub did not give it \(We couldn't connect\)"):
        weights.pretrained("dino", load)
    with pytest.raises(MissingError, match=r"the hub did not answer before \(We couldn't connect\); run `hf download"):
        weights.pretrained("clip-l14", load)
    names = [NEEDED["dino"].source, NEEDED["clip-l14"].source]
    assert asked == [(names[0], True), (names[0], False), (names[1], True)]


def test_what_the_hub_has_not_got_says_nothing_of_others(tmp_path):
    asked = []

    def load(name, local_files_only):
        asked.append(local_files_only)
        raise OSError("no such repository")

    weights = Weights(tmp_path)
    for key in ("dino", "clip-l14"):
        with pytest.raises(MissingError, match="the hub did not give it"):
            weights.pretrained(key, load)
    assert asked == [True, False, True, False]


def test_damaged_weights(tmp_path, weights_folder):
    head = tmp_path / NEEDED["laion-head"].name
    head.write_bytes(b"junk")
    with pytest.raises(MissingError, match="cannot be read"):
        Models(nowhere(tmp_path)).load("laion-head")
    torch.save(torch.nn.Linear(5, 1).state_dict(), head)
    with pytest.raises(MissingError, match="weights of another model"):
        Models(nowhere(tmp_path)).load("laion-head")
    (tmp_path / NEEDED["dino"].name).mkdir()
    with pytest.raises(MissingError, match=r"dino-vitb16 cannot be loaded .* it must hold config.json"):
        Models(nowhere(tmp_path)).load("dino")


def test_a_missing_model_is_looked_for_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "videosparse.metrics.vbench.weights.Weights.file",
        lambda self, key: asked.append(key) or (_ for _ in ()).throw(MissingError("gone")),
    )
    models = Models(nowhere(tmp_path))
    for _ in range(3):
        with pytest.raises(MissingError, match="gone"):
            models.load("laion-head")
    assert asked == ["laion-head"]


def test_raft_flow_and_dynamic_degree(tmp_path):
    """Random weights: only shapes, borders and the way to a score are checked."""
    flows = pytest.importorskip("torchvision.models.optical_flow")
    torch.manual_seed(0)
    torch.save(flows.raft_large(weights=None).state_dict(), tmp_path / NEEDED["raft"].name)
    models = Models(nowhere(tmp_path))
    frames = torch.rand(4, 3, 130, 141)
    flow = models.flow(frames[:1], frames[1:2])
    assert flow.shape == (130, 141, 2)
    assert flow.isfinite().all()
    assert DIMENSIONS["dynamic_degree"].score(as_video(frames, 8), Context(models)).value in (0.0, 1.0)
    with pytest.raises(ValueError, match="at least 128 pixels a side"):
        models.flow(frames[:1, :, :64], frames[1:2, :, :64])


def test_imaging_quality_equals_pyiqa(tmp_path):
    arch = pytest.importorskip("pyiqa.archs.musiq_arch")
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    model = arch.MUSIQ(pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / NEEDED["musiq"].name)
    for size in ((96, 120), (300, 600)):  # the second is above 512 pixels, and made smaller
        video = as_video(torch.rand(2, 3, *size), 16)
        frames = video.levels().permute(0, 3, 1, 2).float()
        scale = min(1.0, 512 / max(size))
        frames = transforms.Resize([int(scale * x) for x in size])(frames) / 255
        with torch.inference_mode():
            expected = sum(float(model(frame[None])) for frame in frames) / 200
        found = DIMENSIONS["imaging_quality"].score(video, Context(Models(nowhere(tmp_path)))).value
        assert found == pytest.approx(expected, abs=1e-5)


def test_lpips_equals_its_package(tmp_path):
    lpips = pytest.importorskip("lpips")
    vision = pytest.importorskip("torchvision.models")
    from videosparse.metrics.perceptual import load_perceptual

    torch.manual_seed(0)
    backbone = vision.alexnet(weights=None)
    torch.save(backbone.state_dict(), tmp_path / NEEDED["alexnet"].name)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    for index in range(1, 6):
        for name, module in getattr(theirs.net, f"slice{index}").named_children():
            module.load_state_dict(backbone.features[int(name)].state_dict())
    a, b = torch.rand(2, 3, 3, 64, 64)
    with torch.inference_mode():
        expected = theirs(a * 2 - 1, b * 2 - 1).flatten()
    distance = load_perceptual(nowhere(tmp_path), batch=2)
    assert torch.allclose(distance(a, b), expected, atol=1e-6)
    assert distance(a, a).abs().max() == 0
