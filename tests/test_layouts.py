"""The layouts and numbers of `pipeline/layouts.py` against the C++ sources and the libraries made of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from pipeline import augment, augment_native, decoder, layouts
from pipeline.native_build import SOURCES

FILES = sorted(path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h"))
CPP = re.sub(r"//[^\n]*", "", "\n".join(path.read_text() for path in FILES))
STRUCTURES = {
    "ViewSpec": layouts.VIEW,
    "Job": layouts.JOB,
    "PackedCall": layouts.PACKED,
    "Finish": layouts.FINISH,
    "BatchPlan": layouts.AUGMENTATION,
}
# C++ type -> (kind, bytes) of the dtype; a pointer is an unsigned integer of eight bytes.
TYPES = {"int32_t": "i4", "uint32_t": "u4", "int64_t": "i8", "uint64_t": "u8", "double": "f8", "pointer": "u8"}


def body(kind: str, name: str) -> str:
    found = re.findall(rf"\b{kind} {name}\b[^{{;]*\{{(.*?)\n?\}};", CPP, re.S)
    assert len(found) == 1, f"{kind} {name} is defined {len(found)} times"
    return found[0]


def members(name: str) -> list[tuple[str, str, int]]:
    """(member, type, count) of a structure, in order."""
    made = []
    for declaration in filter(None, map(str.strip, body("struct", name).split(";"))):
        function = re.fullmatch(r"void \(\*(\w+)\)\(.*\)", declaration, re.S)
        if function:
            made.append((function[1], "pointer", 1))
            continue
        *before, first = re.split(r"\s+", declaration.split(",")[0])
        names = [first, *(each.strip() for each in declaration.split(",")[1:])]
        kind = "pointer" if "*" in declaration else before[-1]
        for each in names:
            parts = re.fullmatch(r"\*?(\w+)(?:\[(\d+)\])?", each)
            assert parts is not None, declaration
            made.append((parts[1], kind, int(parts[2] or 1)))
    return made


def numbers(name: str) -> dict[str, int]:
    """Enumerators of an enum and their values."""
    made: dict[str, int] = {}
    value = 0
    for each in filter(None, map(str.strip, body("enum", name).split(","))):
        label, given = re.fullmatch(r"(\w+)(?: = (.+))?", each).groups()  # type: ignore[union-attr]
        # A number, or the sum of a number and an enumerator before.
        value = sum(made[term] if term in made else int(term) for term in given.split(" + ")) if given else value
        made[label] = value
        value += 1
    return made


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_has_the_members_of_cpp_in_the_same_order(name):
    dtype, wanted = STRUCTURES[name], members(name)
    assert [member for member, _, _ in wanted] == list(dtype.names)
    for member, kind, count in wanted:
        field = dtype[member]
        assert field.base == np.dtype("<" + TYPES[kind]) and field.shape == (() if count == 1 else (count,)), member


def test_numbers_are_those_of_cpp():
    assert numbers("Flags") == {
        "kCheckCrc": layouts.CHECK_CRC,
        "kWholeImage": layouts.WHOLE_IMAGE,
        "kRefuseRotated": layouts.REFUSE_ROTATED,
        "kLibjpegOnly": layouts.LIBJPEG_ONLY,
    }
    assert numbers("Status") == {
        "kOk": layouts.OK,
        "kDamaged": layouts.DAMAGED,
        "kUnsupported": layouts.UNSUPPORTED,
        "kChecksum": layouts.CHECKSUM,
        "kUnreadable": layouts.UNREADABLE,
        "kTooLarge": layouts.TOO_LARGE,
    }
    assert numbers("Decoder") == {"kLibjpeg": layouts.LIBJPEG, "kBaseline": layouts.BASELINE}
    assert numbers("Kind") == {f"k{name.capitalize()}": number for name, number in layouts.KINDS.items()}
    interpolations = {f"k{name.capitalize()}": number for name, number in layouts.INTERPOLATIONS.items()}
    assert numbers("Interpolation") == interpolations
    outputs = {"kAsFloat": torch.float32, "kAsBfloat16": torch.bfloat16, "kAsUint8": torch.uint8, "kAsHalf": torch.half}
    assert numbers("Output") == {name: layouts.OUTPUTS[dtype] for name, dtype in outputs.items()}


def test_columns_of_the_parameters_are_those_of_cpp():
    columns = numbers("Column")
    assert columns.pop("kColumns") == layouts.PARAMETERS == len(augment.COLUMNS)
    order = columns.pop("kOrder")
    assert order == augment.COLUMN["order0"]
    assert columns == {
        f"k{name.capitalize()}": augment.COLUMN[name] for name in augment.COLUMNS if not name.startswith("order")
    }


def test_loaded_libraries_have_these_sizes():
    views, augmentation = decoder.native_library(), augment_native.library()
    if views is None or augmentation is None:
        pytest.skip("no C++ compiler")
    assert views.rg_view_bytes() == layouts.VIEW.itemsize
    assert views.rg_job_bytes() == layouts.JOB.itemsize
    assert views.rg_packed_bytes() == layouts.PACKED.itemsize
    assert augmentation.regatta_augment_plan_bytes() == layouts.AUGMENTATION.itemsize
    assert augmentation.regatta_augment_columns() == layouts.PARAMETERS
