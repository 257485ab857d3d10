"""Other computers, laid out as files and recorded outputs of nvidia-smi; and this one, checked against the kernel."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import psutil
import pytest

from llmlab import drivers, hardware
from llmlab.units import GIB, MIB

DRIVER = "550.54.15"
RAM, FREE = 64 * GIB, 50 * GIB


def lay(root, files: dict[str, str]):
    """Write `files` (path -> text) below `root`."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a program called nvidia-smi first on PATH; it answers --query-gpu, -L and --query-compute-apps."""
    if os.name != "posix":
        pytest.skip("the stand-in for nvidia-smi is a shell script")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def answer(query: str, listing: str = "", code: int = 0, body: str = ""):
        folder = tmp_path / "bin"
        lay(folder, {"query": query, "listing": listing, "nvidia-smi": body or f"""#!/bin/sh
case "$1" in
  -L) cat {folder}/listing ;;
  *) cat {folder}/query ;;
esac
exit {code}
"""})
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return drivers.cards(tmp_path / "elsewhere", RAM, FREE)

    return answer


def row(index, name, total, free, mig="[N/A]", driver=DRIVER):
    return f"{index}, GPU-{index:08d}, {name}, {total}, {free}, {driver}, {mig}\n"


@pytest.mark.parametrize(("name", "total", "card"), [
    ("NVIDIA GeForce RTX 3060", 12288, "rtx-3060-12gb"),
    ("NVIDIA GeForce RTX 3060", 8192, "rtx-3060-8gb"),
    ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060-ti-16gb"),
    ("NVIDIA GeForce RTX 4060 Ti", 8188, "rtx-4060-ti-8gb"),
    ("NVIDIA GeForce RTX 4060 Laptop GPU", 8188, "rtx-4060-laptop-8gb"),
    ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090-24gb"),
    ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm5-80gb"),
    ("NVIDIA A100-SXM4-40GB", 40960, "a100-sxm4-40gb"),
    ("NVIDIA A100 80GB PCIe", 81920, "a100-pcie-80gb"),
    ("Tesla V100-SXM2-32GB", 32768, "tesla-v100-sxm2-32gb"),
    ("Tesla T4", 15360, "tesla-t4-16gb"),
    ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx-6000-ada-48gb"),
])
def test_a_card_is_known_by_what_nvidia_smi_calls_it(smi, name, total, card):
    (found,), driver, notes = smi(row(0, name, total, total - 800))
    assert (found.id, found.memory, found.free) == (card, total * MIB, (total - 800) * MIB)
    assert found.bandwidth > 0 and driver == DRIVER and notes == []


def test_several_cards_keep_the_driver_s_order(smi):
    cards, _, _ = smi(row(0, "NVIDIA GeForce RTX 3090", 24576, 24000) + row(1, "NVIDIA GeForce RTX 3060", 12288, 9000))
    assert [c.id for c in cards] == ["rtx-3090-24gb", "rtx-3060-12gb"]


@pytest.mark.parametrize(("choice", "left"), [
    ("1", ["rtx-3060-12gb"]), ("1,0", ["rtx-3060-12gb", "rtx-3090-24gb"]), ("", []), ("-1", []),
    ("GPU-00000001", ["rtx-3060-12gb"]), ("0,7,1", ["rtx-3090-24gb"]),
])
def test_cuda_visible_devices_hides_cards_and_that_is_said(smi, monkeypatch, choice, left):
    text = row(0, "NVIDIA GeForce RTX 3090", 24576, 24000) + row(1, "NVIDIA GeForce RTX 3060", 12288, 9000)
    smi(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", choice)
    cards, _, notes = drivers.cards(hardware._ROOT / "nowhere", RAM, FREE)
    assert [c.id for c in cards] == left
    assert ("hidden cards" in dict(notes)) == (len(left) < 2)


def test_a_chip_that_shares_the_cpu_s_memory_reports_no_number_and_gets_the_ram(smi):
    (card,), _, notes = smi(row(0, "NVIDIA GB10", "[N/A]", "[N/A]"))
    assert (card.id, card.memory, card.free, card.unified) == ("dgx-spark-gb10-128gb", RAM, FREE, True)
    assert notes == []


def test_a_card_the_catalogue_does_not_have_keeps_its_memory_and_says_so(smi):
    (card,), _, notes = smi(row(0, "NVIDIA Something 9999", 10000, 9000))
    assert (card.memory, card.free) == (10000 * MIB, 9000 * MIB) and math.isnan(card.bandwidth)
    assert "gpus.csv" in dict(notes)["NVIDIA Something 9999"]


def test_mig_shows_the_instances_a_program_can_get(smi):
    listing = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000)
  MIG 1g.10gb     Device  0: (UUID: MIG-aaaaaaaa-1)
  MIG 3g.40gb     Device  1: (UUID: MIG-bbbbbbbb-2)
GPU 1: NVIDIA GeForce RTX 3060 (UUID: GPU-00000001)
"""
    text = row(0, "NVIDIA H100 80GB HBM3", 81559, "[Insufficient Permissions]", mig="Enabled")
    cards, _, notes = smi(text + row(1, "NVIDIA GeForce RTX 3060", 12288, 9000), listing)
    assert [c.memory for c in cards] == [10 * 10**9, 40 * 10**9, 12288 * MIB]
    assert [c.free for c in cards] == [None, None, 9000 * MIB]
    assert "instance" in dict(notes)["NVIDIA H100 80GB HBM3 in parts"]


def test_mig_without_an_instance_is_no_card(smi):
    cards, _, notes = smi(row(0, "NVIDIA H100 80GB HBM3", 81559, 0, mig="Enabled"), "GPU 0: NVIDIA H100 80GB HBM3\n")
    assert cards == () and "no instance" in dict(notes)["NVIDIA H100 80GB HBM3"]


@pytest.mark.parametrize(("text", "code"), [
    ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.183\n", 18),
    ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
     "driver is installed and running.\n", 9),
    ("No devices were found\n", 6),
])
def test_a_driver_that_fails_is_no_card_and_its_own_words_are_shown(smi, text, code):
    cards, _, notes = smi(text, code=code)
    assert cards == () and text.split("\n")[0][:150] in dict(notes)["NVIDIA driver"]


def test_a_lost_card_is_left_out_and_said(smi):
    cards, _, notes = smi(row(0, "NVIDIA GeForce RTX 3090", "[GPU is lost]", "[GPU is lost]")
                          + row(1, "NVIDIA GeForce RTX 3060", 12288, 9000))
    assert [c.id for c in cards] == ["rtx-3060-12gb"] and "lost" in dict(notes)["NVIDIA GeForce RTX 3090"]


def test_an_old_driver_that_knows_no_mig_is_asked_again_without_it(smi):
    cards, _, _ = smi("", body=f"""#!/bin/sh
case "$1" in
  *mig*) echo 'Field "mig.mode.current" is not a valid field to query.'; exit 2 ;;
  *) echo '0, GPU-0, GeForce GTX 1080 Ti, 11178, 11000, {DRIVER}' ;;
esac
""")
    assert [c.id for c in cards] == ["gtx-1080-ti-11gb"]


def test_a_driver_that_hangs_is_given_up(smi, monkeypatch):
    monkeypatch.setattr(drivers, "_SECONDS", 0.2)
    cards, _, notes = smi("", body="#!/bin/sh\nexec sleep 20\n")
    assert cards == () and "did not answer" in dict(notes)["NVIDIA driver"]


@pytest.mark.parametrize("text", ["", "\n", "garbage\n", "a, b\n", ",,,,,,\n", "0, GPU, RTX, -5, x, y, z\n", '"\n'])
def test_nonsense_from_nvidia_smi_never_raises(smi, text):
    cards, _, _ = smi(text)
    assert all(card.memory >= 0 for card in cards)


def test_how_many_processes_use_each_card(smi, tmp_path):
    smi("", body="""#!/bin/sh
case "$1" in
  --query-gpu=uuid) printf 'GPU-a\\nGPU-b\\n' ;;
  *) printf 'GPU-b, 11\\nGPU-b, 12\\n' ;;
esac
""")
    assert drivers.card_users(tmp_path) == (0, 2)


@pytest.fixture
def no_smi(monkeypatch, tmp_path):
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(sys, "platform", "linux")


def test_an_nvidia_card_without_a_driver_is_noticed_on_the_bus(tmp_path, no_smi):
    lay(tmp_path, {"sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
                   "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n"})
    cards, _, notes = drivers.cards(tmp_path, RAM, FREE)
    assert cards == () and "install the driver" in dict(notes)["NVIDIA driver"]


def test_the_sound_part_of_a_card_is_no_card(tmp_path, no_smi):
    lay(tmp_path, {"sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",
                   "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n"})
    assert drivers.cards(tmp_path, RAM, FREE) == ((), "", [])


AMD = {"sys/class/drm/card1/device/vendor": "0x1002\n", "sys/class/drm/card1/device/device": "0x744c\n",
       "sys/class/drm/card1/device/revision": "0xc8\n",
       "sys/class/drm/card1/device/mem_info_vram_total": f"{24560 * MIB}\n",
       "sys/class/drm/card1/device/mem_info_vram_used": f"{560 * MIB}\n",
       "sys/class/drm/card1-HDMI-A-1/device/vendor": "0x1002\n"}
PCI = ("1002  Advanced Micro Devices, Inc. [AMD/ATI]\n\t744c  Navi 31 [Radeon RX 7900 XT/7900 XTX/7900M]\n"
       "\t\t1002 0e3b  a board\n\t150e  Strix [Radeon 890M]\n8086  Intel Corporation\n\t56a0  DG2 [Arc A770]\n"
       "\t64a0  Lunar Lake [Intel Arc Graphics 130V / 140V]\n\t3e92  UHD Graphics 630\n")


@pytest.mark.parametrize("names", [
    {"usr/share/libdrm/amdgpu.ids": "744C,\tC8,\tAMD Radeon RX 7900 XTX\n744C,\tCC,\tAMD Radeon RX 7900 XT\n"},
    {"usr/share/misc/pci.ids": PCI},  # sold under several names: the memory tells them apart
])
def test_an_amd_card_is_read_from_sysfs(tmp_path, no_smi, names):
    (card,), _, notes = drivers.cards(lay(tmp_path, AMD | names), RAM, FREE)
    assert (card.id, card.memory, card.free) == ("rx-7900-xtx-24gb", 24560 * MIB, 24000 * MIB) and notes == []


def test_an_apu_may_use_the_ram_its_driver_maps(tmp_path, no_smi):
    device = "sys/class/drm/card0/device/"
    lay(tmp_path, {device + "vendor": "0x1002", device + "device": "0x150e", device + "revision": "0xc1",
                   device + "mem_info_vram_total": str(GIB), device + "mem_info_vram_used": str(GIB // 2),
                   device + "mem_info_gtt_total": str(30 * GIB), device + "mem_info_gtt_used": "0",
                   "usr/share/hwdata/pci.ids": PCI})
    (card,), _, _ = drivers.cards(tmp_path, RAM, FREE)
    assert (card.id, card.memory, card.free) == ("radeon-890m-igpu", 31 * GIB, 30 * GIB + GIB // 2)


def test_the_display_part_of_a_desktop_processor_is_no_card(tmp_path, no_smi):
    device = "sys/class/drm/card0/device/"
    lay(tmp_path, {device + "vendor": "0x1002", device + "device": "0x164e", device + "revision": "0xc1",
                   device + "mem_info_vram_total": str(512 * MIB)})
    assert drivers.cards(tmp_path, RAM, FREE)[0] == ()


@pytest.mark.parametrize(("number", "ids", "unified"), [
    ("0x56a0", ["arc-a770-16gb"], False), ("0x64a0", ["arc-140v-igpu"], True), ("0x3e92", [], None)])
def test_intel_cards_are_known_by_the_pci_list(tmp_path, no_smi, number, ids, unified):
    device = "sys/class/drm/card0/device/"
    lay(tmp_path, {device + "vendor": "0x8086", device + "device": number, "usr/share/misc/pci.ids": PCI})
    cards, _, _ = drivers.cards(tmp_path, RAM, FREE)
    assert [c.id for c in cards] == ids
    assert all(c.unified == unified and c.memory == (RAM if unified else 16 * GIB) for c in cards)


@pytest.mark.parametrize(("model", "ram", "card"), [
    ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7.4, "jetson-orin-nano-super-8gb"),
    ("NVIDIA Jetson Orin Nano Developer Kit", 3.6, "jetson-orin-nano-4gb"),
    ("NVIDIA Jetson AGX Orin Developer Kit", 61.0, "jetson-agx-orin-64gb"),
])
def test_a_jetson_is_known_by_its_device_tree(tmp_path, no_smi, model, ram, card):
    lay(tmp_path, {"proc/device-tree/model": model + "\0"})
    (found,), _, _ = drivers.cards(tmp_path, int(ram * GIB), GIB)
    assert (found.id, found.memory, found.free, found.unified) == (card, int(ram * GIB), GIB, True)


@pytest.mark.parametrize(("wired", "free"), [("0", 50 * GIB), ("40960", 40 * GIB), ("61440", 50 * GIB)])
def test_an_apple_chip_shares_ram_up_to_its_limit(monkeypatch, tmp_path, wired, free):
    answers = {"machdep.cpu.brand_string": "Apple M3 Max", "iogpu.wired_limit_mb": wired}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(drivers, "sysctl", answers.__getitem__)
    monkeypatch.setattr(drivers, "run", lambda *command: subprocess.CompletedProcess(
        command, 0, '  | {\n  |   "gpu-core-count" = 40\n  | }\n', ""))
    (card,), _, _ = drivers.cards(tmp_path, 128 * GIB, 50 * GIB)
    assert (card.id, card.memory, card.free) == ("apple-m3-max-40c", 128 * GIB, free)


def test_an_apple_chip_that_is_nearly_free_keeps_the_system_s_share(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(drivers, "sysctl", {"machdep.cpu.brand_string": "Apple M4", "iogpu.wired_limit_mb": ""}.get)
    monkeypatch.setattr(drivers, "run", lambda *command: None)
    (card,), _, _ = drivers.cards(tmp_path, 24 * GIB, 24 * GIB)
    assert card.id == "apple-m4-10c" and 0.6 * 24 * GIB < card.free < 0.8 * 24 * GIB


CPUINFO = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx avx2 avx512f amx_int8\n\nprocessor\t: 1\n"


def test_the_cpu_s_features_are_read_in_our_words(tmp_path):
    assert hardware._cpu(lay(tmp_path, {"proc/cpuinfo": CPUINFO}), None).features == (
        "avx", "avx2", "avx512f", "amx_int8")
    arm = lay(tmp_path / "arm", {"proc/cpuinfo": "Features\t: fp asimd asimddp i8mm\nModel\t: A board\n"})
    assert hardware._cpu(arm, None).features == ("neon", "dotprod", "i8mm")
    assert hardware._cpu(arm, None).name == "A board"


def test_a_quota_limits_the_usable_cores(tmp_path):
    assert hardware._cpu(lay(tmp_path, {"proc/cpuinfo": CPUINFO}), 0.5).usable == 1


V2 = {"proc/self/cgroup": "0::/user.slice/app\n", "sys/fs/cgroup/user.slice/memory.max": f"{8 * GIB}\n",
      "sys/fs/cgroup/user.slice/memory.current": f"{3 * GIB}\n",
      "sys/fs/cgroup/user.slice/memory.stat": f"anon 1\ninactive_file {GIB}\n",
      "sys/fs/cgroup/user.slice/app/memory.max": "max\n", "sys/fs/cgroup/user.slice/app/cpu.max": "150000 100000\n"}
V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/abc\n1:cpu:/docker/abc\n0::/\n",
      "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",  # in a container the mount is its own group
      "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
      "sys/fs/cgroup/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\n",
      "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize("files", [V2, V1], ids=["v2", "v1"])
def test_a_container_s_limit_counts_without_its_page_cache(tmp_path, files):
    assert hardware._control_group(lay(tmp_path, files)) == hardware._Limits(8 * GIB, 2 * GIB, 1.5)


@pytest.mark.parametrize("files", [
    {}, {"proc/self/cgroup": "0::/\n"}, {"proc/self/cgroup": "broken\n"},
    {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}])
def test_no_limit_is_no_limit(tmp_path, files):
    assert hardware._control_group(lay(tmp_path, files)) == hardware._Limits(None, 0, None)


def test_a_limit_below_the_ram_is_what_the_machine_has(monkeypatch):
    ram = psutil.virtual_memory().total
    monkeypatch.setattr(hardware, "_control_group", lambda root: hardware._Limits(ram // 2, ram // 2 - GIB, None))
    here = hardware.machine()
    assert here.ram_limit == ram // 2 and here.ram_available <= GIB
    assert "container" in dict(hardware.Doctor(here, None, ()).sections())["RAM"]


@pytest.mark.skipif(not hasattr(os, "major"), reason="device numbers are a POSIX thing")
@pytest.mark.parametrize(("device", "spins", "kind"), [
    ("nvme0n1/nvme0n1p2", "0", "nvme"), ("sda/sda1", "0", "ssd"), ("sda/sda1", "1", "hdd"), ("vda", "1", "virtual")])
def test_the_kind_of_a_disk(tmp_path, monkeypatch, device, spins, kind):
    monkeypatch.setattr(sys, "platform", "linux")
    folder = lay(tmp_path, {f"sys/devices/{device.split('/')[0]}/queue/rotational": spins}) / "sys/devices" / device
    folder.mkdir(exist_ok=True)
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/259:2").symlink_to(folder)
    lay(tmp_path, {"proc/self/mountinfo": "27 1 259:2 / / rw - ext4 /dev/x rw\n"})
    assert hardware._disk_kind(tmp_path, tmp_path, os.makedev(259, 2)) == kind


@pytest.mark.skipif(not hasattr(os, "major"), reason="device numbers are a POSIX thing")
@pytest.mark.parametrize(("mount", "kind"), [
    (r"30 1 0:40 / /mnt/my\040files rw shared:1 - nfs4 host:/x rw", "network"),
    (r"30 1 0:40 / /mnt/my\040files rw - tmpfs tmpfs rw", "memory"),
    (r"30 1 0:40 / /mnt/my\040files rw - btrfs /dev/nvme0n1 rw", "nvme"),
    (r"30 1 0:40 / /mnt/my\040files rw - overlay overlay rw", "unknown")])
def test_the_kind_of_a_file_system_without_a_device(tmp_path, monkeypatch, mount, kind):
    monkeypatch.setattr(sys, "platform", "linux")
    lay(tmp_path, {"proc/self/mountinfo": f"27 1 8:1 / / rw - ext4 /dev/sda1 rw\nbroken\n{mount}\n",
                   "sys/class/block/nvme0n1/queue/rotational": "0"})
    place = hardware._ROOT / "mnt" / "my files" / "models"
    assert hardware._disk_kind(tmp_path, place, os.makedev(0, 40)) == kind


def test_a_folder_that_is_not_made_yet_lies_where_it_will_be_made(tmp_path):
    (disk,) = hardware._disks(hardware._ROOT, (tmp_path / "a" / "b", tmp_path))
    assert disk.path == str(tmp_path / "a" / "b") and 0 < disk.free <= disk.total


def test_wsl_is_told_by_its_kernel(tmp_path):
    lay(tmp_path, {"proc/version": "Linux version 5.15.167.4-microsoft-standard-WSL2 (gcc)"})
    assert hardware._is_wsl(tmp_path) and not hardware._is_wsl(tmp_path / "no")


def test_the_versions_are_those_that_import_gives():
    import numpy

    assert hardware._versions()["numpy"] == numpy.__version__


def test_the_torch_build_is_what_torch_says_of_itself():
    torch = pytest.importorskip("torch")
    build = hardware._torch_build()
    if torch.version.cuda:
        assert build == f"cuda {torch.version.cuda}"
    elif torch.version.hip:
        assert build == f"rocm {torch.version.hip}"
    else:
        assert build in ("cpu", "mps") or build.startswith("xpu")


def lacking(smi, text, *, build="cpu", without=(), driver=None):
    cards, found, notes = smi(text)
    versions = {name: "1" for name in hardware._PACKAGES if name not in without} | {"NVIDIA driver": driver or found}
    cpu = hardware.Cpu("x", 1, 1, 1, ())
    return dict(hardware._lacking(cards, notes, versions, build, (), cpu))


def test_what_is_missing_says_what_that_means(smi):
    card = row(0, "NVIDIA GeForce RTX 3060", 12288, 9000)
    assert lacking(smi, card, build="cuda 12.6") == {}
    assert "CPU" in lacking(smi, "")["graphics card"]
    assert "runs on the CPU until a cuda build" in lacking(smi, card, build="cpu")["torch for NVIDIA"]
    assert "needs driver 580" in lacking(smi, card, build="cuda 13.0", driver="550.1")["newer NVIDIA driver"]
    assert "predicted, not measured" in lacking(smi, card, build="cuda 12.6", without=["bitsandbytes"])["bitsandbytes"]


def test_this_machine_agrees_with_the_kernel():
    here = hardware.machine()
    assert here.ram_total == psutil.virtual_memory().total
    assert 0 < here.ram_available <= here.ram_total
    assert 1 <= here.cpu.usable <= here.cpu.threads >= here.cpu.cores
    assert here.disks and all(0 < d.free <= d.total for d in here.disks)
    assert here.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert here.cards or here.missing
    assert hash(here) == hash(dataclasses.replace(here))                         # panels remember by it
    assert json.loads(json.dumps(here.to_dict(), allow_nan=False))["cpu"]["threads"] == here.cpu.threads


@pytest.mark.gpu
def test_the_cards_agree_with_torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    cards = hardware.machine().cards
    assert len(cards) == torch.cuda.device_count()
    for card, at in zip(cards, range(len(cards)), strict=True):
        free, total = torch.cuda.mem_get_info(at)
        assert abs(card.memory - total) < 0.07 * total and abs(card.free - free) < GIB


def test_an_unknown_bandwidth_is_null_in_json(smi):
    cards, _, _ = smi(row(0, "NVIDIA Something 9999", 10000, 9000))
    here = dataclasses.replace(hardware.machine(), cards=cards)
    assert json.loads(json.dumps(here.to_dict(), allow_nan=False))["cards"][0]["bandwidth"] is None


def test_the_report_shows_the_same_as_text_html_and_dict(smi):
    cards, _, notes = smi(row(0, "NVIDIA GeForce RTX 3060", 12288, 9000))
    here = dataclasses.replace(hardware.machine(), cards=cards, missing=(("a <b>", "c & d"),))
    report = hardware.Doctor(here, (2,), ("/models/x.gguf",))
    assert "GeForce RTX 3060 12GB: 8.79 GiB free of 12.00 GiB, 2 processes computing on it" in repr(report)
    assert "<b>" not in report._repr_html_() and "a &lt;b&gt;: c &amp; d" in report._repr_html_()
    assert report.to_dict()["card_processes"] == [2] and report.to_dict()["models"] == ["/models/x.gguf"]


def test_the_doctor_answers_here():
    report = hardware.doctor()
    labels = [label for label, _ in report.sections()]
    assert {"system", "CPU", "RAM", "card", "disk", "versions", "models"} <= set(labels)


def test_nothing_heavy_is_imported():
    code = "import sys, llmlab.hardware as h; h.machine(); print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
