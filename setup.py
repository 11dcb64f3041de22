"""What pyproject.toml cannot say: a wheel carries the recipes, accelerate configs, batch scripts and tested versions.

They lie beside the package, where people edit them, and go into gemma_dist/share/ of what is built; `shipped.py` finds
them in either place. An editable install reads those of the checkout.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("launch", "accelerate_configs", "slurm", "constraints.txt")  # as gemma_dist/shipped.py names them
OF_A_SITE = ("site.env", "__pycache__")


class BuildWithShipped(build_py):
    """Copies SHIPPED beside the modules."""

    def run(self) -> None:
        """Build the package, then add what is not Python."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "gemma_dist" / "share"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in SHIPPED:
            if Path(name).is_dir():
                shutil.copytree(name, target / name, ignore=shutil.ignore_patterns(*OF_A_SITE))
            else:
                shutil.copyfile(name, target / name)


setup(cmdclass={"build_py": BuildWithShipped})
