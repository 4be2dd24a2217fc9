"""One replica: the Dion step, RMMC, triggers. Imports neither ``torch.distributed`` nor Lightning."""
