"""QLoRA's equations and memory hold for the layers of bitsandbytes and PEFT that train a recipe.

`tests/nf4.py` is the reference: NF4 and double quantization from the paper alone.
"""

import hashlib
import inspect
import json
import math

import pytest
import torch
import yaml
from safetensors import safe_open

from bench import memory
from tests import nf4
from tests.conftest import run, run_first, write_recipe
from tools import architectures, recipes
from tools.train.memory import OPTIMIZERS

METHODS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
RANK, ALPHA = 8, 16
NO_GPU = "paging is CUDA's unified memory, and this machine has no CUDA GPU"


@pytest.fixture(scope="module")
def real(smollm2):
    """A linear layer's weight of SmolLM2: (out, in), float32, by the layer's number and name."""

    def read(number, name):
        part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        with safe_open(smollm2 / "model.safetensors", "pt") as file:
            return file.get_tensor(f"model.layers.{number}.{part}.{name}.weight").float()

    return read


def linear(weight, bits=4, double=True, kind="nf4", dtype=torch.float32, device="cpu"):
    """A layer with that weight, quantized by bitsandbytes where `bits` is 4."""
    import bitsandbytes as bnb

    size = (weight.shape[1], weight.shape[0])
    if bits == 32:
        layer = torch.nn.Linear(*size, bias=False)
    else:
        layer = bnb.nn.Linear4bit(
            *size, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type=kind
        )
    layer.weight.data = weight.to(dtype, copy=True)
    return layer.to(device)


def adapted(layer, rank=RANK, random=True, **how):
    """(PEFT's layer around `layer`, A, B); B is random, or zero as PEFT makes it."""
    from peft import LoraConfig, get_peft_model

    module = torch.nn.Module()
    module.proj, module.forward = layer, layer.forward
    module.is_loaded_in_4bit = type(layer).__name__ == "Linear4bit"
    torch.manual_seed(1)
    wanted = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["proj"], **how)
    proj = get_peft_model(module, wanted).base_model.model.proj
    assert type(proj).__module__.endswith("bnb") == module.is_loaded_in_4bit
    a, b = proj.lora_A["default"].weight, proj.lora_B["default"].weight
    if random:
        torch.nn.init.normal_(b, std=0.02)
    return proj, a, b


def dequantized(layer):
    """W0 of a double-quantized NF4 layer by the reference alone, from the bytes that it holds."""
    state = layer.weight.quant_state
    maxima = nf4.double_decode(
        state.absmax, state.state2.absmax, nf4.dynamic_levels(), state.offset
    )
    return nf4.decode(nf4.unpack(layer.weight.data, state.shape), nf4.levels(), maxima)


# ---- NF4 and double quantization


def test_the_levels_are_normal_quantiles_and_those_of_bitsandbytes():
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    table = nf4.levels()
    assert (int((table < 0).sum()), int((table == 0).sum()), int((table > 0).sum())) == (7, 1, 8)
    # bitsandbytes rounds TAIL to 7 digits and the quantiles' positions to float32: 3 ulp at 1.
    assert (table - get_4bit_type("nf4", "cpu")).abs().max() < 2e-7
    assert (nf4.dynamic_levels() - create_dynamic_map()).abs().max() < 1e-7
    theirs = get_4bit_type("fp4", "cpu").unique()
    torch.testing.assert_close(nf4.TYPES["fp4 (bitsandbytes)"], theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["k_proj", "q_proj", "down_proj"])
def test_bitsandbytes_stores_the_nearest_level_and_the_maximum_of_each_64_weights(real, name):
    weight = real(3, name)
    layer = linear(weight, double=False)
    index, maxima = nf4.encode(weight, nf4.levels(), nf4.BLOCK)
    assert torch.equal(layer.weight.quant_state.absmax, maxima)
    stored = nf4.unpack(layer.weight.data, weight.shape)
    # A weight in the middle of two levels may go to either.
    assert (stored - index).abs().max() <= 1
    assert (stored != index).float().mean() < 1e-5
    assert torch.equal(nf4.pack(stored), layer.weight.data.flatten())


def test_double_quantization_subtracts_the_mean_and_keeps_one_maximum_of_256(real):
    weight = real(3, "down_proj")
    state = linear(weight).weight.quant_state
    maxima = linear(weight, double=False).weight.quant_state.absmax
    assert torch.equal(state.offset, maxima.mean())
    index, second = nf4.encode(maxima - maxima.mean(), nf4.dynamic_levels(), nf4.BLOCK_2)
    assert state.absmax.dtype == torch.uint8 and len(state.absmax) == weight.numel() / 64
    torch.testing.assert_close(state.state2.absmax, second, rtol=0, atol=0)
    # bitsandbytes' search on a CPU ends at a neighbour of the nearest level for 2 in 1000.
    assert (state.absmax.long() != index).float().mean() < 0.005
    stored, nearest = (
        nf4.decode(i, nf4.dynamic_levels(), second, nf4.BLOCK_2)
        for i in (state.absmax.long(), index)
    )
    lost = [(back + maxima.mean() - maxima).norm() for back in (stored, nearest)]
    assert lost[1] <= lost[0] < 1.02 * lost[1]


@pytest.mark.parametrize("name", ["k_proj", "down_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_double_dequantization_is_bitsandbytes_to_the_bit(real, name, dtype):
    from bitsandbytes.functional import dequantize_4bit

    layer = linear(real(3, name), dtype=dtype)
    state = layer.weight.quant_state
    ours = nf4.double_decode(state.absmax, state.state2.absmax, state.state2.code, state.offset)
    ours = nf4.decode(nf4.unpack(layer.weight.data, state.shape), state.code, ours)
    theirs = dequantize_4bit(layer.weight.data, state)
    assert theirs.dtype == dtype
    assert torch.equal(ours.to(dtype), theirs)
    # With the levels from the quantiles, what is left is their last bits.
    largest = ours.abs().max()
    assert (dequantized(layer) - ours).abs().max() <= 4e-7 * largest


def test_the_8_bit_map_of_bitsandbytes_keeps_the_constants_better_than_fp8(real):
    maxima = nf4.encode(real(3, "down_proj"), nf4.levels(), nf4.BLOCK)[1]
    centred = [maxima - maxima.mean()]
    dynamic, fp8 = (
        nf4.error(centred, table, nf4.BLOCK_2) for table in (nf4.dynamic_levels(), nf4.fp8_levels())
    )
    assert dynamic < fp8 < 1e-3


@pytest.mark.parametrize(("double", "bits"), [(False, 0.5), (True, 0.127)])
def test_constants_take_half_a_bit_a_weight_and_an_eighth_with_double_quantization(
    real, double, bits
):
    weight = real(3, "down_proj")
    state = linear(weight, double=double).weight.quant_state
    constants = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert 8 * constants / weight.numel() == pytest.approx(bits, abs=0.0001)


def weights_of(source, real):
    if source == "normal":
        return [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))]
    return [real(number, name) for number in (0, 14, 29) for name in architectures.MODULES]


@pytest.mark.parametrize("source", ["normal", "SmolLM2"])
def test_nf4_loses_least_then_fp4_then_int4(real, source):
    """The paper's order (table 2, by perplexity), here by squared error and in every matrix."""
    for weight in weights_of(source, real):
        error = {name: nf4.error([weight], table) for name, table in nf4.TYPES.items()}
        assert error["nf4"] < error["fp4 (E2M1)"] < error["int4"]
        # bitsandbytes' fp4 has a gap from 1/192 to 1/6 and is the worst of the four.
        assert error["int4"] < error["fp4 (bitsandbytes)"]


@pytest.mark.parametrize(("kind", "name"), [("nf4", "nf4"), ("fp4", "fp4 (bitsandbytes)")])
def test_the_error_is_that_of_the_bitsandbytes_layer(real, kind, name):
    from bitsandbytes.functional import dequantize_4bit

    weight = real(14, "o_proj")
    layer = linear(weight, kind=kind, double=False)
    back = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    share = float((back - weight).square().sum() / weight.square().sum())
    assert share == pytest.approx(nf4.error([weight], nf4.TYPES[name]), rel=1e-3)


# ---- the forward pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_the_forward_pass_is_dequantized_w0_and_gamma_b_a(real, method, dtype, tolerance):
    """y = p16(W0) x + gamma B A x in float64, from the reference's W0; DoRA: m V / |V| x.

    Tolerance: of the largest output. bfloat16 has 8 bits of mantissa, so W0, x and the product
    are each off by up to 0.4 %.
    """
    layer = linear(real(3, "k_proj"), dtype=dtype)
    proj, a, b = adapted(layer, **METHODS[method])
    gamma = ALPHA / math.sqrt(RANK) if method == "rslora" else ALPHA / RANK
    weight = dequantized(layer).double() + gamma * (b @ a).double()
    if method == "dora":
        magnitude = proj.lora_magnitude_vector["default"].weight
        torch.nn.init.uniform_(magnitude, 0.5, 2.0)
        weight *= (magnitude / weight.norm(dim=1)).double()[:, None]
    x = torch.randn(5, 576).to(dtype)
    y = proj(x)
    assert y.dtype == dtype
    expected = x.double() @ weight.T
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("rank", [2, 4, 8, 64])
def test_gamma_is_alpha_over_the_rank_and_over_its_root_for_rslora(rank):
    layer = torch.nn.Linear(16, 16, bias=False)
    x = torch.randn(3, 16)
    for how, gamma in (({}, ALPHA / rank), ({"use_rslora": True}, ALPHA / rank**0.5)):
        proj, a, b = adapted(layer, rank, **how)
        assert proj.scaling["default"] == gamma
        torch.testing.assert_close(proj(x) - layer(x), gamma * x @ a.T @ b.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing(real, method):
    layer = linear(real(3, "v_proj"))
    proj, a, b = adapted(layer, random=False, **METHODS[method])
    assert not b.any() and a.any()
    x = torch.randn(5, 576)
    if method == "dora":  # |V| / m is 1 but for rounding
        torch.testing.assert_close(proj(x), layer(x), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(proj(x), layer(x))


# ---- DoRA


def test_dora_starts_from_the_length_of_each_row_of_w0(real):
    """One magnitude an output, as PEFT and the authors' code have it."""
    layer = linear(real(3, "k_proj"))
    magnitude = adapted(layer, use_dora=True, random=False)[0].lora_magnitude_vector["default"]
    torch.testing.assert_close(magnitude.weight, dequantized(layer).norm(dim=1))


def test_dora_trains_magnitude_and_direction_apart_with_the_length_held_constant(real):
    """Liu et al. 2024, eq. 5 and sec. 4.3: no gradient flows through |V|."""
    layer = linear(real(3, "k_proj"))
    proj, a, b = adapted(layer, use_dora=True)
    magnitude = proj.lora_magnitude_vector["default"].weight
    x = torch.randn(5, 576)
    gradient = torch.randn(5, 192)
    proj(x).backward(gradient)

    ours = [tensor.detach().clone().requires_grad_() for tensor in (a, b, magnitude)]
    direction = dequantized(layer) + ALPHA / RANK * ours[1] @ ours[0]
    length = direction.norm(dim=1).detach()
    (x @ ((ours[2] / length)[:, None] * direction).T).backward(gradient)
    for theirs, mine in zip((a, b, magnitude), ours, strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=1e-4)


# ---- training


def four_bit(folder, method, **load):
    """A 4-bit model with the adapter of a method on q, k and v."""
    from peft import LoraConfig, get_peft_model

    wanted = LoraConfig(
        r=4,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "k_proj", "v_proj"],
        task_type="CAUSAL_LM",
        **METHODS[method],
    )
    torch.manual_seed(0)
    return get_peft_model(memory.load_model(folder, 4, True), wanted, **load).train()


def digests(model):
    """SHA-256 of every tensor that is no part of the adapter, constants of quantization too."""
    frozen = [t for t in memory.list_tensors(model) if not t.requires_grad]
    return [
        hashlib.sha256(
            t.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
        ).hexdigest()
        for t in (t.reshape(-1) for t in frozen)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_only_a_b_and_m_train_and_no_byte_of_w0_changes(tiny, method):
    model = four_bit(tiny, method)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if method == "dora" else set())
    assert {next(part for part in parts if part in name) for name in trained} == parts
    assert len(trained) == 2 * 3 * len(parts)  # layers, modules
    before, start = digests(model), {name: p.detach().clone() for name, p in trained.items()}
    optimizer = memory.make_optimizer(list(trained.values()))
    ids = torch.randint(5, 40000, (2, 24), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in trained), name
        optimizer.step()
        optimizer.zero_grad()
    assert digests(model) == before
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())


def test_an_adapter_is_float32_over_a_16_bit_base_unless_peft_is_told_otherwise(tiny):
    """The paper says 16 bits; PEFT raises them to 32, and so does Axolotl, which calls PEFT."""
    for load, dtype in (({}, torch.float32), ({"autocast_adapter_dtype": False}, torch.bfloat16)):
        model = four_bit(tiny, "lora", **load)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16


# ---- merging


@pytest.mark.parametrize("method", METHODS)
def test_merged_weights_are_w0_and_gamma_b_a(real, method):
    weight = real(3, "k_proj")
    proj, a, b = adapted(linear(weight, 32), **METHODS[method])
    gamma = ALPHA / RANK**0.5 if method == "rslora" else ALPHA / RANK
    expected = weight + gamma * b @ a
    if method == "dora":
        magnitude = proj.lora_magnitude_vector["default"].weight
        expected *= (magnitude / expected.norm(dim=1))[:, None]
    x = torch.randn(5, 576)
    apart = proj(x)
    proj.merge()
    torch.testing.assert_close(proj.get_base_layer().weight, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(proj(x), apart, rtol=1e-4, atol=1e-4)


def test_merging_into_4_bits_rounds_the_sum_to_nf4_again(real):
    layer = linear(real(3, "k_proj"))
    proj, a, b = adapted(layer)
    total = dequantized(layer) + (ALPHA / RANK * b @ a).detach()
    with pytest.warns(UserWarning, match="rounding errors"):
        proj.merge()
    merged = dequantized(proj.get_base_layer())
    lost = (merged - total).square().sum() / total.square().sum()
    assert lost == pytest.approx(nf4.error([total], nf4.levels()), rel=0.02)
    index = nf4.encode(total, nf4.levels(), nf4.BLOCK)[0]
    stored = nf4.unpack(proj.get_base_layer().weight.data, total.shape)
    assert (stored != index).float().mean() < 1e-3


# ---- memory


@pytest.mark.parametrize("name", run_first(2, memory.PRECISIONS))
def test_a_loaded_base_takes_the_bytes_that_are_planned(smollm2, name):
    precision = memory.PRECISIONS[name]
    planned = memory.plan_bytes(*precision, memory.ROWS, memory.TOKENS)
    model = memory.load_model(smollm2, *precision)
    assert memory.count_bytes(model) == pytest.approx(planned["base"], rel=0.001)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU its allocator counts")
def test_the_peak_counts_every_byte_that_is_alive_at_once():
    def steps():
        saved = torch.zeros(2**20)  # 4 MiB
        for _ in range(3):
            saved + 1  # 4 MiB, freed at once
        del saved
        torch.zeros(2**19)

    assert memory.measure_step(steps, before=1000) == pytest.approx(1000 + 2 * 2**22, abs=1024)


# ---- paged optimizers


def test_bitsandbytes_pages_nothing_on_a_cpu_and_steps_as_torch_does():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(512, 512))
    ours = torch.nn.Parameter(theirs.detach().clone())
    paged = bnb.optim.PagedAdamW32bit([theirs], lr=1e-3, weight_decay=0.0)
    plain = torch.optim.AdamW([ours], lr=1e-3, weight_decay=0.0)
    with pytest.warns(UserWarning, match="not supported on CPU"):
        for _ in range(3):
            theirs.grad = torch.randn(512, 512)
            ours.grad = theirs.grad.clone()
            paged.step()
            plain.step()
    assert not any(getattr(t, "is_paged", False) for t in paged.state[theirs].values())
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_cpu_profile_puts_float32_adamw_in_ordinary_memory_in_their_place(
    tiny, chat_rows, tmp_path
):
    assert recipes.build_config("smollm2-135m/sentiment_r4")["optimizer"] == "paged_adamw_8bit"
    steps = {"max_steps": 2, "save_steps": 2, "eval_steps": 2}
    recipe = write_recipe(tmp_path, "r4", tiny, chat_rows, **steps)
    done = run("train", recipe, "--profile", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    config = yaml.safe_load((tmp_path / "r4" / "config.yaml").read_text())
    assert config["optimizer"] == recipes.read_profile("cpu")["optimizer"] == "adamw_torch"
    states = torch.load(tmp_path / "r4" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    moments = [
        state[key] for state in states["state"].values() for key in ("exp_avg", "exp_avg_sq")
    ]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert any(moment.any() for moment in moments)
    trained = json.loads((tmp_path / "r4" / "run.json").read_text())["trainable_parameters"]
    assert sum(m.nbytes for m in moments) == OPTIMIZERS["adamw"] * trained


def test_the_states_of_rank_4_are_too_small_to_be_paged():
    """bitsandbytes pages a state of at least 100,000 elements; no A or B of rank 4 has as many."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    assert "p.numel() < 1e5" in inspect.getsource(Optimizer8bit.get_state_buffer)
    shapes = architectures.find("meta-llama/Llama-3.1-8B-Instruct").shapes.values()
    assert max(4 * max(shape) for shape in shapes) < 1e5
    assert max(64 * max(shape) for shape in shapes) >= 1e5


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_on_a_gpu_large_states_are_paged_and_small_ones_are_not():
    import bitsandbytes as bnb

    large, small = (torch.nn.Parameter(torch.randn(n, 64, device="cuda")) for n in (4096, 64))
    optimizer = bnb.optim.PagedAdamW8bit([large, small])
    for parameter in (large, small):
        parameter.grad = torch.randn_like(parameter)
    before = torch.cuda.memory_allocated()
    optimizer.step()
    states = [optimizer.state[parameter]["state1"] for parameter in (large, small)]
    assert [getattr(state, "is_paged", False) for state in states] == [True, False]
    # Unified memory is not PyTorch's: the two states of `large` are not in its count.
    assert torch.cuda.memory_allocated() - before < 2 * large.numel()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
def test_on_a_gpu_double_dequantization_is_the_references(real):
    from bitsandbytes.functional import dequantize_4bit

    weight = real(3, "down_proj")
    there = linear(weight, device="cuda").weight
    back = dequantize_4bit(there.data, there.quant_state).cpu()
    # The two search for the nearest 8-bit constant differently: a neighbour for a few in 1000.
    torch.testing.assert_close(back, dequantized(linear(weight)), rtol=0.05, atol=1e-6)
