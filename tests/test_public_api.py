import subprocess
import sys

import b2batch


def test_the_public_names_are_these_and_can_be_used():
    assert sorted(b2batch.__all__) == [
        "B2BatchError",
        "JobProgress",
        "JobResult",
        "JobSpec",
        "RunOptions",
        "load_spec",
        "parse_spec",
        "run_job",
    ]
    for name in b2batch.__all__:
        assert getattr(b2batch, name).__name__ == name


def test_importing_the_package_imports_no_framework():
    heavy = ("torch", "ray", "transformers", "pyarrow")
    code = f"import sys, b2batch; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
