"""What runs on the cluster: `python -m trainers <job.json>` drives one attempt of one job."""
