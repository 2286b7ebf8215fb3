"""What a prefetcher raises beyond the built-in exceptions; the compiled runtime raises these too."""


class PrefetchQueueFull(RuntimeError):
    """As many requests are in flight as `depth` allows, and none ended within the time-out."""


class PrefetchCancelled(RuntimeError):
    """The request was cancelled, or its prefetcher closed, while it was in flight."""
