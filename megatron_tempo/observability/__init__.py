"""What a run reports: metrics, records, alerts, progress, heartbeat, traces."""
