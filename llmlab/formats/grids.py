"""The codebooks of the IQ formats: which points of a coarse grid a code may name.

An IQ code names 8 (or 4) weights at once: one point of a grid of a few levels a weight. Of all the points that the
levels span a codebook keeps those that weights of real models come near to. Which ones is a fact that Iwan Kawrakow
found by optimization, not a rule; the tables `iq1s_grid`, `iq2xxs_grid` and so on of llama.cpp's ggml/src/ggml-common.h
state it. A code's number is its point's place in counting order (first weight fastest), so a codebook is a set, and a
set is a bitmap: bit i stands for the point whose i-th digit to the base `len(levels)` is the level of the i-th weight.
The texts below are those bitmaps, through zlib and base 85.
"""

from __future__ import annotations

from base64 import b85decode
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple
from zlib import decompress

if TYPE_CHECKING:
    import torch


class Codebook(NamedTuple):
    """`levels` a weight may have before its sign and scale, `width` weights to a point, `text`: the bitmap."""

    levels: tuple[int, ...]
    width: int
    text: str

    def points(self) -> list[tuple[int, ...]]:
        """The levels of each point, by code."""
        bitmap = decompress(b85decode(self.text))
        every = product(self.levels, repeat=self.width)      # counts with the last fastest, so each is read backwards
        return [point[::-1] for i, point in enumerate(every) if bitmap[i >> 3] >> (i & 7) & 1]


CODEBOOKS = {
    "IQ1": Codebook((-1, 0, 1), 8, (
        "c-k#eK}(!R7=CxE;dM-"
        "9V?RN1diSfb(^(PgE$L;EU0C#DLh=VZ*|bQ>IZZw%yXlwN6ha`hG?#HO$v6$G@ldv(umMk2dT8mb2WdTox*h^v8VtnDuD#8?@Vw9Syw7v(LR2?w<}y}3"
        "b9YJG^C&5*&qs>Nl?x;NhAB!%0hRecnsm$a2YwJ@;QqccSPG~@n#@N5uBY$^gNY22s7}?HYgoxmY#Y+!Ajh1yxWA4l1OzVO1-"
        "XRyWBes^wA;LAoBq<x!%nuPhFWp9`{&R@7DG%<XIwD^Is3Q$Jf@<B<<hd(0^?jzIHG8vQn*?-$Ub(LsHW&@kYNcQ%|}dP%c;av8KJU^mWiJv*28-"
        "WD<$YEG%#}+D!ES;XeDuFD(VlG#i@A4$V;H%7rH52w&LB_pg1xSvl=L<CZ@9?{WdkSxbxSuMq|l64F4MqT|O(RS}O@H(bLXvHn!_OntvSw2GXTKiD_6X"
        "GLxujp0!)qyF+V=7Bv?g3oFy??D1-6?{(2le%HQrc>Le(m#@Cb_P%)g$;r#{<KcsUbe#9?p_<1{H>jE?+1SCIq;Fwj@yPMjA_U90?}vdY$)D1%>fQq-"
        "z{36HBT$I&mG*v%J#A~V%aSj@pZtCEAg}V1eou`2@uUxU_YQ=)6;l3U7EjmAKr#y2F0kdO91c}@u6ikZ68>90+)KINV7E3oVy0wcNC7Qg*Gnz$6Ckekc"
        "j5w;yQl$8BcV}uIeIA*;9XR~L2uzcrHYS+2)y-rqrtcg6e{stpn$cM#il(dTBx(R&0u-"
        ";P1DmAvG}u@dX;b%ns9v~6p49X^c}lqEMlIFjzJBbrp$X4T{{D_p5YV7e^~xM<^E7<_56qcAaL=FI+lT|4v2#Y&dpW2-"
        "Egd@Fdf5G@Dheeu*|v(bMFD;1sQ1"
    )),
    "IQ2_XXS": Codebook((8, 25, 43), 8, (
        "c-"
        "nPRORB^$43oj#tB`je2YP^R=KfcCw)5@K5e=lV<VbEmf91ogR%p3E0BR^O#16P=^@J3)+t0mx___f>P^zDolEn6;is&dxI!#Zg_{KuzkVd4Mw`?l*l~*"
        "(z5~c8Qj-!-YZym34v`$TQ4<4*~)dpL;rq|+W4irx`d$&)6^vGb7UkLBrzcFbHqcf>sMFwRxr;MTG;*}m%Qlby-"
        "@@TSk)X7om@@#uKQIjUUWQ&$2&y}*gX5TV=Bc|Cuh1wL(2Kn3A3Yj<N%;gblzhT7_jxp@MF=lA5st5R^Hl2J=^JV`E{Z0D^#$6R7"
    )),
    "IQ2_XS": Codebook((8, 25, 43), 8, (
        "c-mc2TdsvL2pkgnkBRPwCicH3cK=&BJX-bM<{ZTW!^|+oxJIi-qkD|rsuaR~iB<*?x~C4>8J0pJW<V>X*vo#SY&(-c)w(<-"
        "fCU6QVt|)*=>oJ=N8h~B3mmYKBw*Y)Ca<s*uvOak7T*la5<g=kAh?T96(5+bR(Mt@J=L5^n!u1sF+~=p=RjVCGbM+vDH*59tF!>kC`)-"
        "u3GzO}jM8X_r-*1ytubG*&a^iqGs?p-do}D8x2NWXU?%O)=7t88q040RdJ=Ak)9T+$YBcFD31^6BC_W+mG1}iEA-T}Oj@u6-"
        "pQ1yByIl9%`W3mW#F%j~<yh(N0zSL~oH^Zy%}}tQx4=M73#xoc?jNErTmD?iDs40;(&MG>YYMNuDE=SK;cc#9vM%q_=>7msuqjC"
    )),
    "IQ2_S": Codebook((8, 25, 43), 8, (
        "c-n1JU5W-F3~NE(E9iYHjPDBe{#V(wI=kPpE5rQ7#3X8F%Z9aF@G^(h-"
        "0EI3Em0|W3^QwctZ7zp0a8G#rYWS&oF&YfEj@sgh^u5FBBgC>LAkBEEtarKv-"
        "X}c)kMD5E9g)N*35uFS6j&;COQ!QC2=T0oAzp}=fs8f?3xctXeG?g^dQAA!2(KVP=j1x!<Qgx@l7F)Pu!TMd$m>{ZzEray(N$AzRb24)#*U9zYZZF^+2"
        "!@EVQ9?ARiEH!J<ErE8usn4?()-"
        "BQhW*1pE<<S|Z6aT82aQO}QP4+el6zUY~*z7~Sl6pK?p!Q_DMIhH4w7?joIO9P^#Dw9CRS7mu8OBC|vDii4FoWN_zK9m?6y$}qXC*pyH_2f!)+bXep&H"
        "Xz~CYasM7Fd3(JhmM~KIbkHJ7yU4;E692~{FNElHOf~Fzm+TBn!W(JyjC6"
    )),
    "IQ3_XXS": Codebook((4, 12, 20, 28, 36, 44, 52, 62), 4, (
        "c-l=-F%H5o3_M%0RAmZ7_lgPeigaLyA4Q!IuVCbv_?)J2Rn;aw-<^~BWtxCXwzFx0%xW)eST<YW5KL&L;j#hAAHoX-"
        "c)&}FY<X@1m|7IGsjrX>q7@bAuHrcP3L2_`6x)_>^v5;&o?@Fdagv_Uo9H*utGOGEJ93R6P|L2rgx{U}Y-"
        "UnrS3sKYtPIbF!WdDS7|dsT<9UQCqzhJe8+4kK5km%XvHjm=J(sMgqk-e3v^zjTJayVggoDWMJzTWE4a0T)3l-"
        "9P!ydlNePrBA?Xny*@kmBo4W|8$?wEo20v5Uy_5"
    )),
    "IQ3_S": Codebook((1, 3, 5, 7, 9, 11, 13, 15), 4, (
        "c-k#d!AiqG5PdVu!e&pqA>uXNMyUCUt<-~hDT4SrX{pfmmf{D9Rs{Q#&TgE;z`Qr}-"
        "rMBob#A|%IbF{W(Id*&Lkwq!%0~0(%@Ao{OU0lD_x2OXCI^OquXIKLt}o^pYnG?L6&oz+9HeSVPSrN(A}t!YmF^Xmp*3Qy-5G8(e|b5Y-"
        "VC?q(AA>+32wuC)HmEXp@c1}PT|h83}iuXSwt^ePGkv?U+Lf3a_=1ov?9@{igP&9v4ypFswx3&TJZ@M2_=SuX>*z&qp%+CoXl)ge8!drA@5Agyn!FG+("
        ")?*sDei}n1QT95(J|p-"
        "wR7#Aht{0!Hx!aZfy;cl!bD4D3uqR(zW`GY5;6>@R{_|3X$jRqNR^eu)^e<Ll^vCYlKPU1;QQ+o$IB(hKom+bHx0SXmXXwyZnVo8~6jd#wQ>"
    )),
}


def even_signs(seven: int) -> int:
    """The signs of 8 weights (bit i: weight i is negative) where 7 bits are stored: the number of minuses is even."""
    return seven | (seven.bit_count() & 1) << 7


@cache
def odd(unit: float, device: torch.device) -> torch.Tensor:
    """What a block scale's bits s = 0..15 mean, float32 [16]: (2 s + 1) x unit."""
    import torch
    return torch.arange(1, 32, 2, dtype=torch.float32, device=device) * unit


@cache
def grid(name: str, device: torch.device) -> torch.Tensor:
    """A codebook as one integer a point: the int8 levels of 8 weights as int64, of 4 weights as int32."""
    return joined(CODEBOOKS[name].points()).to(device)


@cache
def signed_grid(name: str, device: torch.device) -> torch.Tensor:
    """A codebook and 7 sign bits looked up at once: int64 [128 x points], by signs x points + code."""
    import torch
    points = torch.tensor(CODEBOOKS[name].points(), dtype=torch.int8)
    minus = torch.tensor([_minus(even_signs(s)) for s in range(128)], dtype=torch.int8)[:, None]
    return joined((points ^ minus) - minus).to(device)


@cache
def masks(bits: int, device: torch.device) -> torch.Tensor:
    """Signs as masks, int64: the i-th byte is -1 where weight i is negative, else 0. Of all 8 signs, or by 7 bits of them."""
    return joined([_minus(even_signs(s) if bits == 7 else s) for s in range(1 << bits)]).to(device)


def pick(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of a table by integers [n, ...] of any kind: [n, all of them]. (As table[index] bytes would be a mask.)"""
    index = index.flatten(1)
    return table.index_select(0, index.reshape(-1).int()).view(index.shape)


def look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of a table of joined bytes by integers [n, ...]: int8 [n, all their bytes]."""
    import torch
    return pick(table, index).view(torch.int8)


def negate(codes: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """`codes` with its sign changed, in place, where `minus` is -1 (both int8): -x is not-x minus -1."""
    return codes.bitwise_xor_(minus).sub_(minus)


def _minus(signs: int) -> list[int]:
    return [-(signs >> i & 1) for i in range(8)]


def joined(rows: list | torch.Tensor) -> torch.Tensor:
    """Runs of 8 or 4 int8 as one integer each."""
    import torch
    rows = torch.as_tensor(rows, dtype=torch.int8)
    return rows.view(torch.int64 if rows.shape[-1] == 8 else torch.int32).reshape(-1)
