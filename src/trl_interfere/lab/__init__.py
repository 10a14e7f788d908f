"""A model that ships with the package, four small domains, and the whole story on them."""

from pathlib import Path


MODEL_FOLDER = Path(__file__).parent / "model"
