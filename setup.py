"Everything this package says of itself stands in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
notebook, export, demo, sweep, dev, pose = (cfg[f"{k}_requirements"].split() for k in ("notebook", "export", "demo", "sweep", "dev", "pose"))

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8") if Path(__file__).with_name("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url=cfg["git_url"],
    author=cfg["author"],
    keywords=cfg["keywords"],
    packages=find_packages(include=["pcan", "pcan.*"]),
    package_data={"pcan": ["weights/*.safetensors"]},
    python_requires=f">={cfg['min_python']},<3.13",
    install_requires=cfg["requirements"].split(),
    extras_require={"notebook": notebook, "export": export, "demo": demo, "sweep": sweep, "dev": notebook + export + demo + sweep + dev, "pose": pose},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
