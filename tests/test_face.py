"What `import pcan` offers, and what it costs."
import subprocess, sys
import pytest
import pcan

@pytest.mark.parametrize("name", pcan.__all__)
def test_every_name_is_there(name): assert getattr(pcan, name) is not None

def test_unknown_name():
    with pytest.raises(AttributeError, match="pcan has no 'PCAM'"): _ = pcan.PCAM

@pytest.mark.parametrize("modules", ["pcan", "pcan.runs"])
def test_training_needs_no_viewer(modules):
    "A machine with torch, numpy, OpenCV and accelerate can train: nothing else is imported before it is used."
    code = f"import sys, {modules}; print([m for m in ('decord','av','matplotlib','pandas','sklearn','torchvision','nbdev','papermill','transformers','mmpose') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()=="[]"
