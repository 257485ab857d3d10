"""A model over hosts: every plan, its messages, its stages, its commands; tests/peers asks llama.cpp itself."""

import json
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.catalog import entries, links
from llmlab.clustering import stages, wire
from llmlab.memory import loaded_bytes, weights
from llmlab.reserving import Stage, shard_bytes
from llmlab.units import GIB

GOLDEN = json.loads((Path(__file__).parent / "golden" / "flags.json").read_text())
TWO = [["rtx-3090-24gb"] * 2, ["rtx-3090-24gb"] * 2]
WIRED = ["eth-1g", "eth-2.5g", "eth-5g", "eth-10g", "eth-25g", "eth-100g"]


def fit_hosts(spec="llama-3-8b", hosts=TWO, **asked):
    return llmlab.fit_hosts(spec, hosts, **asked)


# ---- what must hold of every plan -----------------------------------------------------------------------------------

@pytest.mark.parametrize("asked", [{"quant": "Q4_K_M"}, {"quant": "Q8_0", "kv": "q8_0", "context": 4096, "split": (3, 1)},
                                   {"engine": "vllm", "quant": "BF16"}])
def test_one_host_is_a_fit(asked):
    cards = ["rtx-3090-24gb", "rtx-4090-24gb"]
    plan, report = fit_hosts("llama-3-8b", [cards], **asked), llmlab.fit("llama-3-8b", cards, **asked)
    there = {"head/RAM": "host"} | {f"head/gpu{i}": f"gpu{i}" for i in range(2)}
    assert [replace(t, device=there[t.device]) for t in plan.terms] == list(report.terms)
    for name, device in plan.devices.items():
        assert replace(device, name=there[name]) == report.devices[there[name]]
    assert plan.verdict == report.verdict and not plan.network_share
    if plan.engine == "llama.cpp":
        assert plan.speed.decode_tps == report.speed.decode_tps and plan.speed.prefill_tps == report.speed.prefill_tps
        assert set(report.command().notes) <= set(plan.command().notes) and "rpc" not in plan.command()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["llama-3-8b", "smollm2-135m", "gemma-3-12b", "qwen3-30b-a3b"]), st.lists(st.integers(1, 3), min_size=2,
       max_size=4), st.sampled_from(["Q4_K_M", "Q8_0"]), st.sampled_from([2048, 8192]))
def test_weights_lie_once_and_travel_once(model, counts, quant, context):
    """Every block on one device, all devices together what a single host would hold, and over the network what workers hold."""
    spec = llmlab.model(model)
    plan = llmlab.fit_hosts(spec, [["a40-48gb"] * n for n in counts], quant=quant, context=context)
    assert plan.fits
    blocks = sorted(i for name, rows in plan.layers.items() if name != "head/RAM" for i in rows)
    assert blocks == list(range(len(spec.layers)))
    one = llmlab.fit(spec, ["a40-48gb"] * sum(counts), quant=quant, context=context)
    for name in ("weights", "kv_cache", "recurrent"):
        assert plan.total(name) == one.total(name)
    w = weights(spec, quant)
    here = {id(t): b for t, b in zip(spec.tensors, w.bytes, strict=True)}
    holds = {name for name in plan.layers if name.startswith("worker")}
    travels = sum(here[id(t)] for t in spec.tensors if t.layer >= 0 and any(t.layer in plan.layers[name] for name in holds))
    sent = sum(t.sent for t in plan.loading.values())
    assert travels < sent < travels * 1.001 + 1000 * len(spec.tensors)
    assert all(plan.loading_again[name].sent <= plan.loading[name].sent for name in plan.loading)
    assert sum(t.received for t in plan.traffic.values()) >= 4 * spec.width * len([n for n in plan.layers if "gpu0" in n][1:])


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
@pytest.mark.parametrize("model", ["llama-3-8b", "llama-3-70b"])
def test_a_faster_network_is_never_slower(engine, model):
    quant = "Q4_K_M" if engine == "llama.cpp" else "AWQ_INT4"
    plans = [fit_hosts(model, network=network, engine=engine, quant=quant) for network in WIRED]
    for slow, fast in zip(plans, plans[1:], strict=False):
        assert all(a <= b for a, b in zip(slow.speed.decode_tps, fast.speed.decode_tps, strict=True))
        assert all(a < b for a, b in zip(slow.speed.prefill_tps, fast.speed.prefill_tps, strict=True))
        assert slow.network_share > fast.network_share and slow.traffic == fast.traffic and slow.terms == fast.terms
        assert all(a >= b for a, b in zip(slow.loading_seconds, fast.loading_seconds, strict=True))
    assert all(low <= best <= high <= 2 * low for plan in plans for low, best, high in [plan.speed.prefill_tps])


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 40), st.integers(1, 24), st.sampled_from(["llama.cpp", "vllm"]))
def test_more_memory_everywhere_is_never_a_worse_verdict(size, more, engine):
    order = ["does not fit", "may spill", "fits"]
    card = llmlab.gpu("rtx-3090-24gb")
    found = []
    for memory in (size, size + more):
        given = replace(card, memory=memory * GIB)
        quant = "Q4_K_M" if engine == "llama.cpp" else "AWQ_INT4"
        found.append(order.index(llmlab.fit_hosts("llama-3-70b", [[given], [given]], engine=engine, quant=quant).verdict))
    assert found[0] <= found[1]


def test_the_example_of_the_readme():
    """Llama 3 70B in Q4_K_M on two hosts with a 24 GB card each: it fits, the network is what loading waits for."""
    plan = fit_hosts("llama-3-70b", [["rtx-3090-24gb"], ["rtx-3090-24gb"]], network="1GbE")
    assert plan.fits and not plan.partial and plan.output == "head/gpu0"
    assert plan.layers == {"worker1/gpu0": range(0, 41), "head/gpu0": range(41, 80)}
    assert plan.network_share < 0.05 and plan.loading_seconds[1] > 120
    assert "to worker1" in plan.answer and "over 1 GbE" in plan.answer and "Loading sends" in plan.answer
    alone = llmlab.fit("llama-3-70b", "rtx-3090-24gb")
    assert alone.partial and plan.speed.decode_tps[0] > 2 * alone.speed.decode_tps[2]


def test_what_does_not_fit_says_so():
    plan = fit_hosts("llama-3-70b", [["rtx-3060-12gb"], ["rtx-3060-12gb"]])
    assert plan.partial and plan.verdict == "does not fit" and plan.layers["head/RAM"].start == 0
    assert f"{plan.gpu_layers} of 81 layers go on the cards (" in plan.answer            # what goes there is not what is needed
    assert "does not fit GeForce RTX 3060 12GB (head) and GeForce RTX 3060 12GB (worker1). " in plan.answer


# ---- llama.cpp's messages -------------------------------------------------------------------------------------------

def test_a_token_on_the_wire():
    """By hand: hidden state, position, two cell numbers, mask of 256 padded cells in f16, each in a message of its own; the
    graph named; the hidden state fetched. Held against llama.cpp in tests/peers."""
    spec = llmlab.model("llama-3-8b")
    where = (0,) * 16 + (1,) * 17
    [head, worker] = wire.step(spec, wire.Request(2048), where, [1, 0], used=100)
    message = 1 + 8 + 296 + 9
    assert head == wire.Traffic()
    assert worker.sent == 5 * message + (4 * 4096 + 4 + 8 + 8 + 2 * 256) + 13 + (1 + 8 + 296 + 16)
    assert worker.received == 8 + 4 * 4096 and worker.rounds == 1
    [_, new] = wire.step(spec, wire.Request(2048), where, [1, 0], used=100, new=True)
    assert (new.sent - worker.sent) % 8 == 0 and 100_000 < new.sent - worker.sent < 300_000
    [_, both] = wire.step(spec, wire.Request(2048), where, [1, 1], used=100)     # the output there too: logits come back
    assert both.received == 8 + 4 * 128256 + 9 and both.rounds == 2              # what its second device gets is copied there


def test_a_prompt_is_the_sum_of_its_batches():
    spec = llmlab.model("smollm2-135m")
    where = (0,) * 15 + (1,) * 16
    request = wire.Request(4096)
    batches = [wire.step(spec, request, where, [1, 2], used, 512, True) for used in range(512, 2049, 512)]
    rest = wire.step(spec, request, where, [1, 2], 2100, 52, True)
    for host, total in enumerate(wire.prompt(spec, request, where, [1, 2], 2100, 512)):
        assert total.sent == sum(batch[host].sent for batch in batches) + rest[host].sent
        assert total.received == sum(batch[host].received for batch in batches) + rest[host].received


def test_the_graph_is_sent_every_256_tokens():
    spec, request, where = llmlab.model("smollm2-135m"), wire.Request(2048), (0,) * 31
    [_, again], [_, new] = (wire.step(spec, request, where, [1], 300, 1, sent) for sent in (False, True))
    [_, mean] = wire.decode(spec, request, where, [1], 300)
    assert mean.sent == pytest.approx(again.sent + (new.sent - again.sent) / 256)


# ---- vLLM's stages --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("layers", "count", "expected"), [
    (80, 2, [40, 40]), (5, 3, [2, 2, 1]), (22, 4, [5, 6, 6, 5]), (61, 8, [7, 7, 8, 8, 8, 8, 8, 7]), (32, 1, [32])])
def test_layers_are_dealt_out_as_vllm_does(layers, count, expected):
    assert stages.dealt(layers, count) == expected


@pytest.mark.parametrize(("hosts", "expected"), [
    ([2, 2], (2, 2)), ([4, 2], (2, 3)), ([3, 3], (1, 6)), ([1, 1], (1, 2)), ([2, 1], (1, 3)), ([8, 8], (8, 2))])
def test_how_cards_share(hosts, expected):
    spec = llmlab.model("llama-3-8b")                          # 32 heads
    plan = llmlab.fit_hosts(spec, [["a40-48gb"] * n for n in hosts], engine="vllm", quant="BF16")
    assert (plan.share, len(plan.cards) // plan.share) == expected
    assert sorted({i for rows in plan.layers.values() for i in rows}) == list(range(32))


@pytest.mark.parametrize("quant", ["BF16", "AWQ_INT4", "FP8"])
def test_stages_hold_every_tensor_once(quant):
    for name in sorted(entries())[::7]:
        spec = llmlab.model(name)
        count = len(spec.layers)
        try:
            whole = loaded_bytes(spec, quant)
        except llmlab.LabError:
            continue
        assert shard_bytes(spec, quant, 1, Stage(0, count, 1)) == whole
        parts = stages.stages_of(spec, 1, 2)
        table = next(b for t, b in zip(spec.tensors, weights(spec, quant).bytes, strict=True) if t.name == "token_embd.weight")
        total = sum(shard_bytes(spec, quant, 1, part) for part in parts)
        assert total == whole + table * spec.tied, name


def test_what_vllm_sends():
    plan = fit_hosts("llama-3-70b", engine="vllm", quant="AWQ_INT4")
    assert plan.traffic == {"head": wire.Traffic(2 * 8192 * 2, 0, 0), "worker1": wire.Traffic(0, 2 * 8192 * 2, 1)}
    sums = [p for p in plan.speed.parts if p.what == "exchange"]
    assert [p.device for p in sums] == ["head", "worker1"] and sums[0].amount == 2 * 40 * 8192 * 2
    bridged = fit_hosts("llama-3-70b", engine="vllm", quant="AWQ_INT4", bridge="nvlink3-bridge-3090")
    assert bridged.speed.decode_tps[1] > plan.speed.decode_tps[1]


# ---- commands -------------------------------------------------------------------------------------------------------

def words_of(text: str, program: str) -> list[list[str]]:
    """The arguments of each call of a program, as a shell reads them."""
    script = f'{program}() {{ printf "%s\\0" "$@"; printf "\\n"; }}\n' + "".join(
        f"{other}() {{ :; }}\n" for other in ("ggml-rpc-server", "llama-server", "ray", "vllm") if other != program) + text
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


def test_the_commands_of_rpc():
    text = fit_hosts("llama-3-70b", [["rtx-3090-24gb"], ["rtx-3090-24gb"], ["rtx-4090-24gb"]]).command(
        addresses=["head.lan", "10.0.0.2", "10.0.0.3"])
    server, *options = GOLDEN["llama-cpp-python"]["rpc server"]
    calls = words_of(text, server)
    assert [call[:4] for call in calls] == [["--host", address, "--port", "50052"] for address in ("10.0.0.2", "10.0.0.3")]
    assert {word for call in calls for word in call if word.startswith("--")} <= set(options)
    [head] = words_of(text, "llama-server")
    assert head[:2] == ["--rpc", "10.0.0.2:50052,10.0.0.3:50052"] and head[head.index("--tensor-split") + 1].count(",") == 2
    assert {word for word in head if word.startswith("--")} <= set(GOLDEN["llama-cpp-python"]["options"])
    assert text.index("--host 10.0.0.2") < text.index("--rpc") and "private" in " ".join(text.notes)


def test_the_commands_of_ray():
    plan = fit_hosts("llama-3-70b", engine="vllm", quant="AWQ_INT4", utilization=0.85)
    text = plan.command(addresses=["10.0.0.1", "10.0.0.2"])
    head, worker = words_of(text, "ray")
    assert head == "start --head --node-ip-address 10.0.0.1 --port 6379 --num-gpus 2".split()
    assert worker == "start --address 10.0.0.1:6379 --node-ip-address 10.0.0.2 --num-gpus 2".split()
    assert {word for word in (*head, *worker) if word.startswith("--")} <= set(GOLDEN["ray start"]["names"])
    [serve] = words_of(text, "vllm")
    told = dict(zip(serve[2::2], serve[3::2], strict=True))
    assert set(told) <= set(GOLDEN["vllm"]["options"])
    assert told.items() >= {"--tensor-parallel-size": "2", "--pipeline-parallel-size": "2", "--gpu-memory-utilization": "0.85",
                            "--distributed-executor-backend": "ray", "--max-model-len": "8192"}.items()


if find_spec("ray"):
    def test_ray_has_these_options():
        from ray.scripts.scripts import start
        assert set(GOLDEN["ray start"]["names"]) <= {name for option in start.params for name in option.opts}


def test_without_addresses_there_are_names_to_replace():
    text = fit_hosts().command()
    assert "HEAD_ADDRESS" in text.notes[0] and words_of(text, "llama-server")[0][:2] == ["--rpc", "WORKER1_ADDRESS:50052"]


# ---- what cannot be -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("asked", "says"), [
    ({"hosts": []}, "list of hosts"), ({"hosts": "rtx-3090-24gb"}, "list of hosts"),
    ({"hosts": [["rtx-3090-24gb"], []]}, "worker1 has no cards"), ({"hosts": [[], None]}, "worker1 has no cards"),
    ({"hosts": [[]]}, "no host has a card"), ({"hosts": [["rtx-9"], ["x"]]}, "card"),
    ({"hosts": [["rtx-3090-24gb"]] * 18}, "16 servers"), ({"network": "eth-11g"}, "no network"),
    ({"network": None}, "no network"), ({"network": "0 GB/s"}, "no network"),
    ({"network": True}, "no network"), ({"round_trip": 0}, "round_trip"),
    ({"round_trip": "fast"}, "round_trip"), ({"engine": "transformers"}, "one host"), ({"engine": "exo"}, "engine"),
    ({"n_cpu_moe": 3}, "n_cpu_moe"), ({"engine": "vllm", "split": (1, 1)}, "leave split"), ({"split": (1, 2)}, "2 shares"),
    ({"engine": "vllm", "hosts": [[], ["rtx-3090-24gb"]]}, "head"), ({"engine": "vllm", "bridge": "string"}, "link"),
    ({"engine": "vllm", "quant": "Q4_K_M"}, "vLLM"), ({"context": 0}, "context"),
    ({"engine": "vllm", "spec": "smollm2-135m", "hosts": [["a40-48gb"] * 10] * 4}, "40 stages for 30 layers"),
])
def test_bad_input_is_one_clear_line(asked, says):
    with pytest.raises(llmlab.LabError) as caught:
        fit_hosts(**asked)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("addresses", ["10.0.0.1", ["10.0.0.1"], ["10.0.0.1", "10.0.0.2:50052"], ["10.0.0.1", "$(reboot)"],
                                       ["a", "b"],
                                       ["10.0.0.1", 2]])
def test_bad_addresses(addresses):
    with pytest.raises(llmlab.LabError):
        fit_hosts().command(addresses=addresses)
    with pytest.raises(llmlab.LabError, match="engine='vllm'"):
        fit_hosts().command("vllm")
    with pytest.raises(llmlab.LabError, match="llama.cpp"):
        fit_hosts().command("ollama")


def test_an_address_of_two_hosts_is_refused():
    plan = fit_hosts(hosts=[["rtx-3090-24gb"]] * 3)
    for addresses in (["10.0.0.1", "10.0.0.2", "10.0.0.2"], ["10.0.0.2", "10.0.0.3", "10.0.0.2"]):
        with pytest.raises(llmlab.LabError, match="'10.0.0.2' is the address of two hosts; give each its own"):
            plan.command(addresses=addresses)


@pytest.mark.parametrize(("text", "id"), [
    ("ethernet-10g", "eth-10g"), ("10GbE", "eth-10g"), ("2.5 GbE", "eth-2.5g"), ("1g", "eth-1g"), ("Wi-Fi 6", "wifi6-2x2"),
    ("ETH-100G", "eth-100g"), ("thunderbolt-5", "thunderbolt-5")])
def test_names_of_networks(text, id):
    assert fit_hosts(network=text).link.id == id


@pytest.mark.parametrize(("given", "rate"), [("9.4 Gb/s", 9.4e9 / 8 * 1448 / 1538), ("940 Mbit/s", 940e6 / 8 * 1448 / 1538),
                                             ("1.1 GB/s", 1.1e9), (2e8, 2e8), (links()["eth-5g"], links()["eth-5g"].rate)])
def test_rates_of_networks(given, rate):
    assert fit_hosts(network=given, round_trip=1e-4).link.rate == pytest.approx(rate)


def test_as_tables_and_json():
    plan = fit_hosts("llama-3-70b")
    assert len(plan.to_frame()) == 5 and [row["host"] for row in plan.traffic_table] == ["worker1"]
    said = json.loads(json.dumps(plan.to_dict()))
    assert said["devices"]["worker1/gpu0"]["blocks"] == [0, 21] and said["traffic"]["worker1"]["received"] == 8 * 4 + 32768 - 15


def test_from_a_shell(capsys):
    from llmlab.cli import main
    cards = ["rtx-3090-24gb", "rtx-3090-24gb,rtx-3090-24gb"]
    assert main(["hosts", "llama-3-70b", *cards, "--network", "10GbE", "--json"]) == 0
    plan = llmlab.fit_hosts("llama-3-70b", [[cards[0]], [cards[0]] * 2], network="10GbE")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan.to_dict()))
    assert main(["hosts", "llama-3-70b", *cards, "--commands", "--address", "10.0.0.1", "--address", "10.0.0.2"]) == 0
    assert capsys.readouterr().out.strip() == plan.command(addresses=["10.0.0.1", "10.0.0.2"]).strip()
    assert main(["hosts", "llama-3-70b", "none", "none"]) == 2 and "worker1" in capsys.readouterr().err
