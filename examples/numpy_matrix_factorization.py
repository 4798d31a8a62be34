"""Matrix factorisation by hand in NumPy: embeddings of users and films, from ratings.

A rating is taken to be the mean, plus what the user adds, plus what the film adds, plus the product
of their embeddings. The ratings are made up in that way, with noise, so that one knows how good a
prediction can be. A batch meets few of the rows: parameter groups give the embeddings a decay that
the rest does not have, and Adagrad gives a row that is seldom met a larger step.
"""

import numpy as np

import fastopt

rng = np.random.default_rng(0)
users, films, width, noise = 400, 300, 4, 0.5
taste, kind = rng.standard_normal((users, width)), rng.standard_normal((films, width))
harshness, quality = rng.standard_normal(users) / 2, rng.standard_normal(films) / 2

u, f = np.divmod(rng.permutation(users * films)[:30_000], films)  # a quarter of all pairs
rating = 3 + harshness[u] + quality[f] + (taste[u] * kind[f]).sum(axis=1) / 2
rating += noise * rng.standard_normal(len(rating))
known, asked = slice(0, 27_000), slice(27_000, None)


def predict(u, f):
    """Return the ratings that these users would give these films."""
    return mean + user_bias[u] + film_bias[f] + (user_rows[u] * film_rows[f]).sum(axis=1)


def gradients(u, f, error):
    """Return the gradients by all parameters; rows that the batch does not meet get zero."""
    grads = [np.zeros_like(p) for p in opt.params]
    np.add.at(grads[0], u, error[:, None] * film_rows[f])  # adds up where a row occurs twice
    np.add.at(grads[1], f, error[:, None] * user_rows[u])
    np.add.at(grads[2], u, error)
    np.add.at(grads[3], f, error)
    grads[4][...] = error.sum()
    return grads


user_rows = 0.1 * rng.standard_normal((users, width))
film_rows = 0.1 * rng.standard_normal((films, width))
user_bias, film_bias, mean = np.zeros(users), np.zeros(films), np.zeros(())
opt = fastopt.Adagrad(
    [
        {"params": [user_rows, film_rows], "weight_decay": 1e-4},
        {"params": [user_bias, film_bias, mean]},
    ],
    lr=0.3,
)

size, epochs = 1000, 30
for epoch in range(1, epochs + 1):
    order, total = rng.permutation(27_000), 0.0
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        error = predict(u[batch], f[batch]) - rating[batch]
        opt.step(gradients(u[batch], f[batch], error / size))
        total += (error * error).sum()
    if epoch % 5 == 0:
        print(f"Epoch [{epoch}/{epochs}], Loss: {total / len(order):.4f}")


def rmse(error):
    """Return the root of the mean square."""
    return np.sqrt((error * error).mean())


print(f"Error of the mean rating: {rmse(rating[known].mean() - rating[asked]):.3f}")
print(f"Test error: {rmse(predict(u[asked], f[asked]) - rating[asked]):.3f}")
print(f"Noise of the ratings: {noise:.3f}")
