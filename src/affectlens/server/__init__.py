"""What `affectlens serve` runs: the API, the dashboard, and what they keep."""
