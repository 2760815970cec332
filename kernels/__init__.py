"""GPU kernels; installed as `revit_fast.kernels`."""
