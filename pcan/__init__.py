"A notebook-first replication of PCAN (AAAI 2025). The names most people need; each module has more."
__version__ = "0.1.0"

_FACE = dict(MA52="tree", ActionTree="tree", draw_skeleton="skeleton", Clips="clips", validate="validation", ClipSpec="augment", prepare="augment", heatmaps="heatmap",
             RGBPoseConv3D="rgbpose", Method="model", pcan="model", poseconv3d="model", evaluate="metrics", Run="config", make="config", get="runs", get_all="runs")
__all__ = list(_FACE)

def __getattr__(name): # imports a module when a name of it is first used, so that `import pcan` costs nothing
    if name not in _FACE: raise AttributeError(f"pcan has no {name!r}; its modules have more names than {', '.join(_FACE)}")
    from importlib import import_module
    return getattr(import_module(f"pcan.{_FACE[name]}"), name)
