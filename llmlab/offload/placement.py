"""Where each piece of a model lives and how it comes to the device: what a plan decides and a stream carries out."""

from dataclasses import dataclass, field

TIERS = ("device", "ram", "ssd")
MODES = ("exact", "fast")


@dataclass(frozen=True)
class Placement:
    """where: tier by piece name, "device" (resident there), "ram" (copied to a slot for each pass) or "ssd" (read into one); a
    piece that is not named is on "ssd". Of experts those named on "device" are always there; all others come through the expert
    cache, from RAM where they are named "ram".

    slots: buffers on the device that layers which are not resident take turns in: one at least, two to read ahead.
    expert_slots: of the expert cache, all layers together. readers: threads that read. direct: past the page cache. kv: tier
    of the KV cache, "device" or "ram". context: tokens that it has room for; kv_types: as `Decoder.open` takes them. layout:
    "gguf" (the file's own bytes) or "words" (as compiled code takes them). mode: "exact", or "fast": what is in "ram" is
    computed where it lies (see `aside`).
    """

    where: dict[str, str] = field(default_factory=dict)
    slots: int = 2
    expert_slots: int = 0
    readers: int = 2
    direct: bool = False
    kv: str = "device"
    context: int = 4096
    kv_types: str | tuple[str, str] | None = None
    layout: str = "gguf"
    mode: str = "exact"

    def tier(self, piece: str) -> str:
        return self.where.get(piece, "ssd")

    def brought(self, piece: str, many: bool = True) -> bool:
        """Whether a pass has it brought to the device. many: a pass for which what lies in RAM comes in fast mode, too."""
        tier = self.tier(piece)
        return tier == "ssd" or tier == "ram" and (many or self.mode == "exact")
