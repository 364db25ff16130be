"""Maps of tokens, prompts and experts: which vectors, their layout, their clusters, how good it is.

data         Source(unit, feature, layer, site): the vectors, and the facts of their points
pca          the picture that is there at once
make         UMAP, clusters, another router's choices: what the worker makes
point_clusters  groups in the original space; trustworthiness, and what groups say of domains
rerouted     where another router would send the tokens of a map
map_cache    what was made, kept between starts
point_table  how dense the points are, and which are in a region that somebody drew
bench        ``python -m explorer.maps.bench``: how long all of that takes

Only ``rerouted`` needs torch; scikit-learn and umap are for ``make`` and ``point_clusters`` alone.
"""
