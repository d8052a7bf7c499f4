"""From statistics to experts: scores, clusters, partitions, assembly, export, router."""
