"""Maps of tokens, prompts and experts: which vectors, their layout, their clusters, how good it is.

features    Source(unit, feature, layer, site)      read_points(run, source)
projection  pca(values), at once                    project(values, options, report), UMAP
clustering  cluster(values, method, n_clusters=), in the original space
quality     trustworthiness(values, xy)             cluster_domain(labels, domains, groups)
cache       map_path(digest, options)               clusters_path(digest, method, n_clusters, seed)
work        make_map(...), make_clusters(...): all of it, as the worker process does it
bench       ``python -m explorer.maps.bench``: how long all of that takes

Nothing here needs torch; umap and scikit-learn are imported when they are used.
"""
