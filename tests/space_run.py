"""The finished run that the Space shows, and text that no page may run."""

from pathlib import Path


DATA = Path(__file__).parents[1] / "space" / "data" / "lab"
HOSTILE = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>${window.hacked=1} ![](http://127.0.0.1:9/x)"
)
