"""Many runs of one base configuration: enumerated, run one after another, ranked."""
