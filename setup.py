"""Which packages are built: all of ``src/``, and ``conf/`` as ``mp_lightning.conf``.

Everything else is in ``pyproject.toml``. ``conf/`` becomes a package so that Hydra's
``config_path="pkg://mp_lightning.conf"`` works from a wheel and from an editable install alike.
"""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    package_dir={"": "src", "mp_lightning.conf": "conf"},
    packages=[
        *find_packages("src", include=["mp_lightning", "mp_lightning.*"]),
        "mp_lightning.conf",
        # Hydra finds plugins in this namespace only, which has no __init__.py as others share it. Unless the namespace
        # itself is listed too, an editable install keeps its folder from Hydra.
        *find_namespace_packages("src", include=["hydra_plugins", "hydra_plugins.*"], exclude=["*.__pycache__"]),
    ],
)
