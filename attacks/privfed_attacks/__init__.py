"""The adversary: attacks that read only an Observation. The trusted code never imports this package."""
