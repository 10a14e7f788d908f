"""A finished run, and text that no page may run."""

from pathlib import Path


DATA = Path(__file__).parents[2] / "space" / "data" / "lab"
HOSTILE = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>${window.hacked=1} ![](http://127.0.0.1:9/x)"
)
