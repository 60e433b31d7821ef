"""What a run reports while it runs: metrics, records, alerts, progress, heartbeat, traces."""
