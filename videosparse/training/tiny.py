"""Parts of the training of the embedded tiny Wan model: models, parallel VAE, tokenizer, losses, sampling.

The program that puts them together is `eval/train_tiny_model.py`.

Shapes: video [B, 3, F, H, W] in [-1, 1]; latents [B, C, T, h, w] with T = 1 + (F - 1) / 4, h = H / 4;
token ids [B, S]; text embeddings [B, S, E].
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_LENGTH = 48
FLOW_SHIFT = 3.0
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
MIB = 1 << 20


@dataclass(frozen=True)
class TinySizes:
    """Every size that fixes the weights. The defaults are the published model."""

    vae_base: int = 16
    z_dim: int = 8
    layers: int = 8
    heads: int = 4
    head_dim: int = 64
    ffn_dim: int = 640
    text_dim: int = 128
    text_ff: int = 256
    text_layers: int = 2
    vocab: int = 768


SMOKE_SIZES = TinySizes(vae_base=8, layers=2, heads=2, head_dim=24, ffn_dim=64, text_dim=32, text_ff=64)


def build_vae(sizes: TinySizes, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
    """The Wan VAE: 4x in time, 4x in space, `z_dim` channels."""
    return AutoencoderKLWan(
        base_dim=sizes.vae_base,
        z_dim=sizes.z_dim,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
        latents_mean=list(mean) if mean is not None else [0.0] * sizes.z_dim,
        latents_std=list(std) if std is not None else [1.0] * sizes.z_dim,
    )


def build_transformer(sizes: TinySizes) -> WanTransformer3DModel:
    """The DiT. The output projection starts at zero, so that training starts from the trivial prediction."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.z_dim,
        out_channels=sizes.z_dim,
        text_dim=sizes.text_dim,
        freq_dim=64,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.layers,
        rope_max_seq_len=512,
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "condition_embedder" not in name:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    for name in ("time_embedder.linear_1", "time_embedder.linear_2", "text_embedder.linear_1"):
        nn.init.normal_(model.condition_embedder.get_submodule(name).weight, std=0.02)
    nn.init.normal_(model.condition_embedder.time_proj.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    return model


def build_text_encoder(sizes: TinySizes, vocab: int) -> UMT5EncoderModel:
    """A small UMT5 encoder without dropout; eager attention, because SDPA's mask check waits for the device."""
    config = UMT5Config(
        vocab_size=vocab,
        d_model=sizes.text_dim,
        d_kv=sizes.text_dim // 4,
        d_ff=sizes.text_ff,
        num_layers=sizes.text_layers,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        attn_implementation="eager",
    )
    return UMT5EncoderModel(config)


def _rms_silu(x: Tensor, gain: Tensor) -> Tensor:
    """SiLU of the Wan RMS norm over channels. x: [B, C, F, H, W]; gain: [C, 1, 1, 1]; computed in fp32."""
    xf = x.float()
    inverse = xf.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt()
    return F.silu((xf * inverse).to(x.dtype) * gain.to(x.dtype))


class ParallelVae:
    """The Wan VAE over all frames at once, with the same weights and result as its chunk-by-chunk loop.

    Every temporal operator of the model is causal, so the chunked cache only saves memory. Running whole
    clips needs five times fewer kernel launches at 17 frames, which is what limits training speed.
    `fused` compiles the norm and the activation into one kernel.
    """

    def __init__(self, vae: AutoencoderKLWan, fused: bool = False) -> None:
        self.vae = vae
        self.fused = fused
        self.rms_silu: Callable = torch.compile(_rms_silu, dynamic=True) if fused else _rms_silu

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        gain = norm.gamma * norm.scale
        if self.fused:
            # The reduced dimension has three sizes in all; a kernel that knows it keeps the sum in registers.
            torch._dynamo.mark_static(x, 1)
            torch._dynamo.mark_static(gain, 0)
        return self.rms_silu(x, gain)

    def _residual(self, block: WanResidualBlock, x: Tensor) -> Tensor:
        h = block.conv_shortcut(x)
        x = block.conv1(self._norm(block.norm1, x))
        return block.conv2(self._norm(block.norm2, x)) + h

    def _mid(self, block: nn.Module, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        return self._residual(block.resnets[1], block.attentions[0](x))

    @staticmethod
    def _spatial(layer: WanResample, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = layer.resample(x.transpose(1, 2).reshape(b * t, c, h, w))
        return y.view(b, t, *y.shape[1:]).transpose(1, 2)

    def _down(self, layer: WanResample, x: Tensor) -> Tensor:
        """The first frame stays alone; later outputs see a window of three frames with stride two."""
        x = self._spatial(layer, x)
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], layer.time_conv(x)], 2)

    def _up(self, layer: WanResample, x: Tensor) -> Tensor:
        """The first frame is not doubled and is not seen by the temporal convolution of the others."""
        b, c, t, h, w = x.shape
        if t > 1:
            rest = layer.time_conv(x[:, :, 1:]).reshape(b, 2, c, t - 1, h, w)
            rest = torch.stack((rest[:, 0], rest[:, 1]), 3).reshape(b, c, 2 * (t - 1), h, w)
            x = torch.cat([x[:, :, :1], rest], 2)
        return self._spatial(layer, x)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance, each [B, z, T, h, w], of video [B, 3, F, H, W]."""
        encoder = self.vae.encoder
        x = encoder.conv_in(video)
        for layer in encoder.down_blocks:
            x = self._down(layer, x) if isinstance(layer, WanResample) else self._residual(layer, x)
        x = encoder.conv_out(self._norm(encoder.norm_out, self._mid(encoder.mid_block, x)))
        mean, logvar = self.vae.quant_conv(x).chunk(2, 1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Unclamped video [B, 3, F, H, W] of raw (not normalised) latents [B, z, T, h, w]."""
        decoder = self.vae.decoder
        x = self._mid(decoder.mid_block, decoder.conv_in(self.vae.post_quant_conv(latents)))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x)
            if block.upsamplers is not None:
                x = self._up(block.upsamplers[0], x)
        return decoder.conv_out(self._norm(decoder.norm_out, x))


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Mean SSIM with a uniform window over frames. a, b: fp32 [B, C, F, H, W] in [0, 1]."""
    a, b = (x.transpose(1, 2).flatten(0, 1) for x in (a, b))
    maps = torch.cat([a, b, a * a, b * b, a * b], 1)
    mu_a, mu_b, aa, bb, ab = F.avg_pool2d(maps, window, stride=1).chunk(5, 1)
    var_a, var_b, cov = aa - mu_a * mu_a, bb - mu_b * mu_b, ab - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean()


def vae_loss(model: ParallelVae, video: Tensor, noise: Tensor, kl_weight: float, square_weight: float = 1.0) -> Tensor:
    """L1 + 0.1 (1 - SSIM) + 0.5 temporal-difference L1 + squares + KL. video in [-1, 1]; noise like the latents.

    Objects are the only saturated things in this world and cover a few percent of it, so pixels weigh up to five times
    as much with their saturation: otherwise the patterns behind an object decide its colour. The squared error is
    there for the start: the L1 of a small bright object is lowest for a while where the object is missing.
    """
    mean, logvar = model.encode(video)
    mean, logvar = mean.float(), logvar.float()
    decoded = model.decode(mean + noise * torch.exp(0.5 * logvar)).float()
    target = video.float()
    weight = 1 + 2 * (target.amax(1, keepdim=True) - target.amin(1, keepdim=True))
    l1 = ((decoded - target).abs() * weight).mean()
    motion = ((decoded[:, :, 1:] - decoded[:, :, :-1]) - (target[:, :, 1:] - target[:, :, :-1])).abs().mean()
    similarity = ssim((decoded + 1) / 2, (target + 1) / 2)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    square = (decoded - target).square().mean()
    return l1 + 0.1 * (1 - similarity) + 0.5 * motion + square_weight * square + kl_weight * kl


def psnr(decoded: Tensor, video: Tensor) -> Tensor:
    """Mean over clips of the PSNR in dB, of videos in [-1, 1]."""
    error = (decoded.float().clamp(-1, 1) - video.float()).div(2).square().flatten(1).mean(1)
    return (-10 * torch.log10(error.clamp_min(1e-10))).mean()


def train_tokenizer(captions: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with byte fallback (so that any text has ids) that ends every text with `</s>`.

    The end mark matters: the empty prompt of guidance becomes one token instead of none.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = [PAD, EOS, UNK]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator((prompt_clean(text) for text in captions), trainer)
    # Byte tokens must be in the vocabulary but must not be matched as literal text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return wrap_tokenizer(tokenizer.to_str())


def wrap_tokenizer(state: str) -> PreTrainedTokenizerFast:
    """The transformers tokenizer of a serialised `tokenizers` tokenizer."""
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state),
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=TEXT_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Tensor:
    """Ids int16 [N, 48], cleaned, truncated and padded as `WanPipeline.encode_prompt` does; 0 is padding."""
    if not captions:
        return torch.zeros(0, TEXT_LENGTH, dtype=torch.int16)
    ids = tokenizer(
        [prompt_clean(text) for text in captions],
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        add_special_tokens=True,
    ).input_ids
    return torch.tensor(ids, dtype=torch.int16)


def embed_text(text_encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """Embeddings [B, 48, E] of ids [B, 48], as `WanPipeline.encode_prompt(max_sequence_length=48)` makes them.

    The encoder sees the padding mask, and positions past the true length are zero. The mask goes in already
    expanded: given a [B, 48] mask transformers asks the device whether it is all ones, which stalls training.
    """
    valid = ids.ne(0)
    dtype = text_encoder.get_input_embeddings().weight.dtype
    bias = torch.zeros(valid.shape, dtype=dtype, device=ids.device).masked_fill_(~valid, torch.finfo(dtype).min)
    bias = bias[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    hidden = text_encoder(ids.long(), bias).last_hidden_state
    return hidden * valid.unsqueeze(-1)


def sample_sigmas(batch: int, device: torch.device, uniform_share: float = 0.1, shift: float = FLOW_SHIFT) -> Tensor:
    """Noise levels [B] in (0, 1): logit-normal, stratified over the batch, then shifted as the scheduler does.

    A share is uniform instead, so that the ends of the schedule, where sampling starts and stops, are trained.
    """
    quantile = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    quantile = quantile.clamp(1e-5, 1 - 1e-5)
    normal = torch.sigmoid(math.sqrt(2.0) * torch.erfinv(2 * quantile - 1))
    uniform = torch.rand(batch, device=device)
    t = torch.where(torch.rand(batch, device=device) < uniform_share, uniform, normal)
    return shift * t / (1 + (shift - 1) * t)


def flow_loss(transformer: nn.Module, text: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Flow-matching error per sample [B]: the network predicts noise - x0 at (1 - sigma) x0 + sigma noise."""
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * x0 + level * noise
    predicted = transformer(
        hidden_states=noisy, timestep=sigma * 1000.0, encoder_hidden_states=text, return_dict=False
    )[0]
    return (predicted.float() - (noise - x0)).square().flatten(1).mean(1)


@torch.no_grad()
def euler_sample(
    transformer: nn.Module, text: Tensor, empty: Tensor, noise: Tensor, steps: int = 20, guidance: float = 4.0
) -> Tensor:
    """Latents of a plain Euler solver with guidance. text [B, S, E], empty [1, S, E], noise [B, C, T, h, w]."""
    t = torch.linspace(1.0, 0.0, steps + 1)
    sigmas = (FLOW_SHIFT * t / (1 + (FLOW_SHIFT - 1) * t)).tolist()
    both = torch.cat([text, empty.expand_as(text)])
    x = noise.float()
    for now, following in itertools.pairwise(sigmas):
        timestep = torch.full((len(both),), now * 1000.0, device=x.device)
        out = transformer(
            hidden_states=torch.cat([x, x]), timestep=timestep, encoder_hidden_states=both, return_dict=False
        )[0]
        cond, uncond = out.float().chunk(2)
        x = x + (following - now) * (uncond + guidance * (cond - uncond))
    return x


@dataclass
class Progress:
    """How far a phase is: the larger of its step share and its time share, over all its calls."""

    steps: int
    minutes: float
    step: int = 0
    before: float = 0.0
    since_resume: int = 0
    warmup: int = 300

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.resumed = self.step > 0

    @property
    def elapsed(self) -> float:
        """Seconds spent in this phase, earlier calls included."""
        return self.before + time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """How much is done, 0 to 1."""
        return min(1.0, max(self.step / self.steps, self.elapsed / (60 * self.minutes)))

    @property
    def ended_by(self) -> str:
        """Which limit was reached first."""
        return "steps" if self.step >= self.steps else "minutes"

    def lr_factor(self) -> float:
        """Cosine over `fraction`; linear warm-up at the start, and a shorter one after a resume."""
        factor = 0.5 * (1 + math.cos(math.pi * self.fraction))
        warmup = 200 if self.resumed else self.warmup
        return factor * min(1.0, (self.since_resume + 1) / warmup)

    def advance(self) -> None:
        """Count one step."""
        self.step += 1
        self.since_resume += 1


class Ema:
    """An exponential moving average of parameters, written into `shadow`, a copy of the module."""

    def __init__(self, module: nn.Module, shadow: nn.Module, decay: float = 0.999, updates: int = 0) -> None:
        self.source = list(module.parameters())
        self.target = list(shadow.requires_grad_(False).eval().parameters())
        self.decay, self.updates = decay, updates

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights; fast in the first steps."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.target, self.source, 1 - decay)


def adamw(modules: Sequence[nn.Module], lr: float | Tensor, capturable: bool = False) -> torch.optim.AdamW:
    """Fused AdamW; weight decay only on matrices of the linear and convolution layers."""
    decay, plain = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            matrix = parameter.ndim >= 2 and not any(key in name for key in ("shared", "table", "gamma", "bias"))
            (decay if matrix else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True, capturable=capturable)


def pick_attention(length: int = 2304, batch: int = 48) -> list:
    """SDPA backends by measured speed of forward and backward; a backend that fails or is wrong goes last."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    base = torch.randn(3, batch, length, 4, 64, device="cuda", dtype=torch.bfloat16)
    times, outs = {}, {}
    for backend in (flash, cudnn):
        try:
            q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in base)
            with sdpa_kernel(backend):
                for run in range(8):
                    if run == 3:
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                    out = F.scaled_dot_product_attention(q, k, v)
                    out.backward(out.detach())
                torch.cuda.synchronize()
            times[backend] = time.perf_counter() - start
            outs[backend] = torch.cat([out.detach().float().flatten()[:100000], q.grad.float().flatten()[:100000]])
        except RuntimeError as error:
            print(f"attention: {backend} failed: {str(error)[:160]}", flush=True)
    if len(outs) == 2 and (outs[flash] - outs[cudnn]).norm() > 0.05 * outs[flash].norm():
        print("attention: cuDNN disagrees with flash, not used", flush=True)
        times.pop(cudnn)
    print("attention:", {str(k): round(v / 5 * 1e3, 2) for k, v in times.items()}, "ms forward+backward", flush=True)
    return sorted(times, key=times.__getitem__) + rest


def shard(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Tensors in order, in groups whose bytes stay under `limit`."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def write_backup(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], limit: int = 14 * MIB) -> None:
    """Tensors as `weights-*.safetensors` of at most `limit` bytes and `state.json`, replaced one by one."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for index, group in enumerate(shard(tensors, limit)):
        path = folder / f"weights-{index}.safetensors"
        save_file(group, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    (folder / "state.tmp").write_text(json.dumps(meta))
    (folder / "state.tmp").replace(folder / "state.json")


def read_backup(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_backup` wrote."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        tensors |= load_file(path)
    return tensors, json.loads((folder / "state.json").read_text())


def sizes_of(meta: dict[str, Any]) -> TinySizes:
    """The sizes recorded in a checkpoint."""
    return TinySizes(**meta["sizes"])


def sizes_dict(sizes: TinySizes) -> dict[str, int]:
    """Sizes as a checkpoint records them."""
    return asdict(sizes)
