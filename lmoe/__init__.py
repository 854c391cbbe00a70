"""lmoe: pretraining Linear-MoE models in native PyTorch."""
