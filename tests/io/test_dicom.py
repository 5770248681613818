"""Whole-number pixels of more than 8 bits, in arrays and in DICOM files, and what is refused of them."""

import sys
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.cli.app import run as command_line
from holdfast.core.errors import HoldfastError
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData

pydicom = pytest.importorskip("pydicom")
LEVELS = np.arange(12, dtype=np.int64).reshape(3, 4) * 372  # to 4092, in 12 bits
NET = (
    "import torch\n\ndef make():\n    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))\n"
    "    with torch.no_grad():\n        net[1].weight.copy_(torch.stack([torch.zeros(12), torch.ones(12)]))\n"
    "        net[1].bias.copy_(torch.tensor([0.0, -6]))\n    return net\n"
)


def write(
    path, levels=LEVELS, *, bits=12, high_bit=None, signed=False, kind="MONOCHROME2", frames=1, colour=False
):
    """Write an uncompressed DICOM file whose pixels are (rows, columns) levels from 0 to 2 ** bits - 1."""
    levels = np.asarray(levels)
    file = pydicom.Dataset()
    file.SOPClassUID = file.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[path.name])
    file.Rows, file.Columns = levels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = (3, "RGB") if colour else (1, kind)
    if colour:
        file.PlanarConfiguration = 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, bits, high_bit or bits - 1
    file.PixelRepresentation = int(signed)
    file.WindowCenter, file.WindowWidth, file.RescaleSlope, file.RescaleIntercept = 40, 80, 2, -1024
    if frames > 1:
        file.NumberOfFrames = frames
    values = levels - signed * 2 ** (bits - 1)
    pixels = np.repeat(values[..., None], 3, -1) if colour else values
    file.PixelData = np.repeat(pixels[None], frames, 0).astype("<i2" if signed else "<u2").tobytes()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def replaced(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """A folder of two classes with two files each: one in every form that is read."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    write(Path("scans/ill/1.dcm"))
    write(Path("scans/ill/2.DCM"), 4095 - LEVELS, kind="MONOCHROME1")
    write(Path("scans/well/1.dcm"), signed=True)
    write(Path("scans/well/2.dcm"), LEVELS[::-1])
    return tmp_path


@pytest.mark.usefixtures("scans")
def test_dicom_files_are_read_by_their_bits_and_the_inverted_ones_are_inverted_again():
    data = open_data("scans")
    batch = data.read(0, 4)
    expected = {"ill": [LEVELS, LEVELS], "well": [LEVELS, LEVELS[::-1]]}
    assert data.classes == ("ill", "well") and tuple(batch.x.shape) == (4, 1, 3, 4)
    for name, label in (("ill", 0), ("well", 1)):
        for x, levels in zip(batch.x[batch.y == label], expected[name], strict=True):
            assert np.array_equal((x[0].numpy() * 4095).round(), levels)
    assert any("12 bits" in note and "no window" in note for note in data.notes)


def test_a_run_on_dicom_files_has_the_result_of_the_same_pixels_in_an_array(scans):
    x = open_data("scans").read(0, 4)
    np.savez("scans.npz", x=(x.x.numpy()[:, 0] * 4095).round().astype(np.uint16), y=x.y.numpy())
    command = ["-t", "linf:4/255", "-s", "pgd", "--no-doubts", "--trust-code", "--groups", "label"]
    for name, *options in (("scans",), ("scans.npz", "--bits", "12")):
        outputs = ["--run", f"run-{name}", "-o", f"{name}.json"]
        assert command_line(["assess", "net.py:make", name, *command, *options, *outputs]) == 0
    first, second = (holdfast.report(f"run-{name}").metrics for name in ("scans", "scans.npz"))
    assert dict(first) == dict(second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_bytes(b"no DICOM"), "is no DICOM file"),
        (lambda p: write(p, colour=True), "is 'RGB'; one grey channel"),
        (lambda p: write(p, high_bit=15), "12 bits up to bit 15; HighBit 11"),
        (lambda p: (write(p, frames=2), replaced(p, b"IS\2\0002 ", b"IS\2\0x ")), "cannot be decoded"),
        (lambda p: write(p, frames=2), "has 2 frames"),
        (lambda p: write(p, LEVELS.T), "is 4 x 3, .* is 3 x 4"),
        (lambda p: write(p, LEVELS // 4, bits=10), "has 12 bits, .* 10"),
        (lambda p: p.write_bytes(p.read_bytes()[:-5]), "cannot be decoded"),
    ],
)
@pytest.mark.usefixtures("scans")
def test_a_file_that_is_no_grey_picture_like_the_others_is_named(change, message):
    path = Path("scans/well/2.dcm")
    change(path)
    with pytest.raises(HoldfastError, match=message) as refused:
        open_data("scans")
    assert str(path) in refused.value.message


@pytest.mark.usefixtures("scans")
def test_dicom_files_without_pydicom_state_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setattr("holdfast.io.sandbox.calling.HERE.limited", True)
    assert command_line(["assess", "net.py:make", "scans", "--trust-code"]) == 2
    assert 'pip install "holdfast-ml[dicom]"' in capsys.readouterr().err


X12 = np.stack([LEVELS, LEVELS[::-1]]).astype(np.uint16)
Y12 = np.array([0, 1])


@pytest.mark.parametrize(
    ("x", "bits", "message"),
    [
        (X12, None, r"uint16 from 0 to 4092; .*; give bits=12 to holdfast.open_data for pixels of 12 bits"),
        (X12, 10, r"from 0 to 4092; 0 to 1023, for 10 bits, was expected; give bits=12 to"),
        (X12 / 4095, 12, "bits is 12, and the inputs of .* are float64; whole numbers were expected"),
        (X12.astype(np.int16) - 1, 12, r"from -1 to 4091; 0 to 4095"),
    ],
)
def test_bits_that_do_not_fit_the_values_are_refused(x, bits, message, scans):
    np.savez("x.npz", x=x, y=Y12)
    with pytest.raises(HoldfastError) as refused:
        open_data("x.npz", expected=DeclaredData(bits=bits))
    refused.match(message)


@pytest.mark.usefixtures("scans")
def test_bits_of_bounds_that_are_not_0_to_1_and_of_folders_of_images_are_refused(capsys):
    np.savez("x.npz", x=X12, y=Y12)
    command = ["assess", "net.py:make", "--trust-code", "--bits", "12"]
    assert command_line([*command, "x.npz", "--bounds", "0,4095"]) == 2
    assert "unit=range; leave out --bits" in capsys.readouterr().err
    assert command_line([*command, "scans"]) == 2
    assert "state their own bits" in capsys.readouterr().err


def test_arrays_in_python_have_bits_too(scans):
    model = holdfast.open_model("net.py:make", trust_code=True)
    result = holdfast.assess(
        model, holdfast.open_data((X12, Y12), bits=12), "linf:4/255", "pgd", doubts=False
    )
    assert len(result.evidence) == 2
