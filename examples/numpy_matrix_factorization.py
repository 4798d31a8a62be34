"""Matrix factorisation by hand in NumPy: embeddings of users and films, from ratings.

A rating is taken to be the mean, plus what the user adds, plus what the film adds, plus the product
of their embeddings. The ratings are made up in that way, with noise, so that one knows how good a
prediction can be; some films are rated far more often than others. A batch meets few of the rows
and has a gradient for no others: ``fastopt.Rows``, which adds up where a row occurs twice.
Parameter groups give the embeddings a decay that the rest does not have, and Adagrad gives a row
that is seldom met a larger step.
"""

import numpy as np

import fastopt

rng = np.random.default_rng(0)
users, films, width, noise = 6000, 4000, 4, 0.5
taste, kind = rng.standard_normal((users, width)), rng.standard_normal((films, width))
harshness, quality = rng.standard_normal(users) / 2, rng.standard_normal(films) / 2

u = rng.integers(0, users, 600_000)
f = (films * rng.random(len(u)) ** 1.5).astype(np.int64)
rating = 3 + harshness[u] + quality[f] + (taste[u] * kind[f]).sum(axis=1) / 2
rating = (rating + noise * rng.standard_normal(len(u))).astype(np.float32)
known, asked = slice(0, 540_000), slice(540_000, None)


def predict(u, f):
    """Return the ratings that these users would give these films."""
    return mean + user_bias[u] + film_bias[f] + (user_rows[u] * film_rows[f]).sum(axis=1)


def gradients(u, f, error):
    """Return the gradients by all parameters: of tables, a row for each rating of the batch."""
    by_user, by_film = error[:, None] * film_rows[f], error[:, None] * user_rows[u]
    rows = [(u, by_user), (f, by_film), (u, error), (f, error)]
    return [*(fastopt.Rows(*each) for each in rows), error.sum()]


user_rows = 0.1 * rng.standard_normal((users, width), np.float32)
film_rows = 0.1 * rng.standard_normal((films, width), np.float32)
user_bias, film_bias = np.zeros(users, np.float32), np.zeros(films, np.float32)
mean = np.zeros((), np.float32)
opt = fastopt.Adagrad(
    [
        {"params": [user_rows, film_rows], "weight_decay": 1e-5},
        {"params": [user_bias, film_bias, mean]},
    ],
    lr=0.3,
)

size, epochs = 1000, 10
for epoch in range(1, epochs + 1):
    order, total = rng.permutation(540_000), 0.0
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        error = predict(u[batch], f[batch]) - rating[batch]
        opt.step(gradients(u[batch], f[batch], error / size))
        total += (error * error).sum()
    if epoch % 2 == 0:
        print(f"Epoch [{epoch}/{epochs}], Loss: {total / len(order):.4f}")


def rmse(error):
    """Return the root of the mean square."""
    return np.sqrt((error * error).mean())


print(f"Error of the mean rating: {rmse(rating[known].mean() - rating[asked]):.3f}")
print(f"Test error: {rmse(predict(u[asked], f[asked]) - rating[asked]):.3f}")
print(f"Noise of the ratings: {noise:.3f}")
