"""hijack-lens: which memory wrote each output logit, the context or the weights?"""
