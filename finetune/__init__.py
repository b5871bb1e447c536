"""What every recipe shares: settings, checks, the command line, the configuration's parts, and how a run starts."""
